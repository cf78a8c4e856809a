"""The Kernel protocol, the choice of a kernel, and what a model is given to attend with.

Shapes: R rows, T query length, U key length, N query heads, M key/value heads, D head_dim. A kernel
sees rows flattened into one token axis: ``[R * T, N, D]``; the mask says which document is where.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec

FLASH_ATTN_MINIMUM = (2, 8)
INSTALL_FLASH_ATTN = (
    'pip install "flash-attn>=2.8,<3" --no-build-isolation (docs/kernels.md: which builds go together)'
)


class Kernel(Protocol):
    """Attention over documents with its own backward; it computes and never communicates.

    ``lse`` is float32 ``[N, tokens]``, the natural log-sum-exp of the scaled scores, ``-inf`` for a
    query that sees no key (its output is 0). ``backward`` takes the *global* ``out`` and ``lse`` of a
    query over all its keys, also when ``k`` and ``v`` are only some of them: partial gradients of
    several calls then add up to the whole. (Differentiating through a merge of partial results
    instead gives an exact forward and wrong gradients, because no kernel's lse has a gradient.)
    """

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """``(out [tokens_q, N, D], lse [N, tokens_q])`` for q ``[tokens_q, N, D]``, k and v ``[tokens_k, M, D]``."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: MaskSpec,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` in the shapes and dtypes of q, k and v."""
        ...


@dataclass(frozen=True)
class HeadShape:
    """The heads that a kernel is checked with: a model's, or a common shape."""

    num_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64

    def __str__(self) -> str:
        return f"{self.num_heads} heads on {self.kv_heads} of {self.head_dim}"


COMMON_HEADS = HeadShape()


@dataclass(frozen=True)
class ScorePart:
    """One region of an attention whose queries and keys are rotated in a way of their own.

    Attributes:
        q, k: ``[R, S, N, D]`` and ``[R, S, M, D]``, rotated for this region.
        mask: the region; the parts of one attention must not overlap. On one rank and under Ulysses any mask will do;
            a cache shared by ranks takes bands of distances (``window``, ``min_distance``).
    """

    q: Tensor
    k: Tensor
    mask: MaskSpec


@dataclass(frozen=True)
class ScoreBias:
    """A term added to the scaled scores, made from distances tile by tile, so that no N^2 tensor is kept.

    Attributes:
        values: float ``[N, ...]``, what the heads differ in; has a gradient if it requires one.
        function: ``(values, distance [T, U])`` to ``[N, T, U]``, differentiable in ``values``; distance is the
            query's position minus the key's. Each head of the result depends on its own ``values[n]`` alone.
        q_positions, k_positions: ``[R, S]`` positions of the queries and of the keys.
    """

    values: Tensor
    function: Callable[[Tensor, Tensor], Tensor]
    q_positions: Tensor
    k_positions: Tensor


class SequenceOps(Protocol):
    """What a model is given for everything that crosses the sequence; it cannot tell one rank from many.

    Shapes: S is this rank's tokens; q ``[R, S, N, D]``, k and v ``[R, S, M, D]``; masks are those of the
    whole micro-batch. Every result is ``[R, S, N, D]`` unless said. On one rank, the softmax forms also take
    keys and values of other tokens than the queries', ``[R, U, M, D]``, with a mask that counts them.
    """

    @property
    def share(self) -> float:
        """What this rank counts of a quantity that each of the ranks of a row computes (1 / sp_size)."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """Softmax attention."""
        ...

    def attend_parts(self, parts: Sequence[ScorePart], v: Tensor, softmax_scale: float) -> Tensor:
        """One softmax over the keys of all parts, which see disjoint regions."""
        ...

    def attend_biased(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float, bias: ScoreBias
    ) -> Tensor:
        """Softmax attention whose scaled scores have ``bias`` added."""
        ...

    def linear_attend(
        self, q_rotated: Tensor, k_rotated: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec
    ) -> Tensor:
        """Linear attention of feature maps q and k, positive, rotated in the numerator only (RoFormer, eq. 19)."""
        ...

    def pool(self, x: Tensor, weights: Tensor) -> Tensor:
        """``sum_t weights[r, t] x[r, t]`` over the whole sequence: x ``[R, S, C]``, weights ``[R, S]``, ``[R, C]``.

        Every rank of a row gets the same sum; a loss made from it counts ``share`` on each.
        """
        ...


def choose_kernel(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    heads: HeadShape = COMMON_HEADS,
) -> tuple[Kernel, str]:
    """The kernel called ``name`` and the reason for the choice.

    Args:
        name: ``auto``, ``sdpa`` (CPU), ``varlen`` or ``flash_attn`` (CUDA), ``reference`` (anywhere).
        device: where it is to run.
        dtype: of queries, keys and values.
        heads: with which a CUDA kernel must pass its check.

    Raises:
        ValueError: the named kernel does not run here, or a CUDA kernel fails its check against float64.
    """
    from roformer_dist.kernels.reference import ReferenceKernel
    from roformer_dist.kernels.sdpa import SdpaKernel

    device = torch.device(device)
    if name == "reference":
        return ReferenceKernel(), "asked for: float64, quadratic memory, for checking only"
    if device.type == "cpu" and name in ("auto", "sdpa"):
        why = "asked for" if name == "sdpa" else "the device is a CPU"
        return SdpaKernel(), f"{why}: PyTorch's CPU flash attention, by document"
    if device.type == "cuda" and name != "sdpa":
        return _cuda_kernel(name, device, dtype, heads)
    fitting = {"cpu": "auto, sdpa or reference", "cuda": "auto, varlen, flash_attn or reference"}
    raise ValueError(
        f"train.kernel = {name!r} does not run on device {device.type!r}; there it may be "
        f"{fitting.get(device.type, 'reference')}"
    )


def _cuda_kernel(name: str, device: torch.device, dtype: torch.dtype, heads: HeadShape) -> tuple[Kernel, str]:
    from roformer_dist.kernels.selfcheck import check_kernel, check_rotation
    from roformer_dist.kernels.varlen import FlashAttn2, TorchFlash, VarlenKernel

    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"train.kernel = {name!r}: flash attention on CUDA computes in bf16, not in {dtype}; "
            'set train.precision = "bf16", or train.kernel = "reference" for a check'
        )
    if trouble := check_rotation(device, dtype):
        raise ValueError(f"the rotation on {device} fails its check against float64: {trouble}")
    flashes = {"varlen": TorchFlash, "flash_attn": FlashAttn2}
    missing = {"varlen": torch_flash_missing, "flash_attn": flash_attn_missing}
    found: list[str] = []
    for candidate in flashes if name == "auto" else (name,):
        trouble = missing[candidate](device)
        kernel = VarlenKernel(flashes[candidate]())
        trouble = trouble or check_kernel(kernel, device, dtype, heads)
        if trouble is None:
            why = "asked for" if name != "auto" else "; ".join(["the first that passes", *found])
            return kernel, f"{why}: forward and gradients agree with float64 on this device"
        found.append(f"{candidate}: {trouble}")
    raise ValueError(f"train.kernel = {name!r} has no kernel on {device}: {'; '.join(found)}")


def torch_flash_missing(device: torch.device) -> str | None:
    """Why PyTorch's own flash attention does not run on ``device``; None when it does."""
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention; pip install a CUDA build of torch>=2.11"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0 (Ampere)"
    return None


def flash_attn_missing(device: torch.device) -> str | None:
    """Why the flash-attn package cannot be used; None when it can."""
    try:
        present = importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
        version = metadata.version("flash-attn")
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        present, version = False, ""
    if not present:
        return f"flash-attn is not installed: {INSTALL_FLASH_ATTN}"
    if tuple(int(part) for part in version.split(".")[:2]) < FLASH_ATTN_MINIMUM:
        return f"flash-attn {version} is older than 2.8: {INSTALL_FLASH_ATTN}"
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        return f"flash-attn {version} was built for another torch ({error}): {INSTALL_FLASH_ATTN}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0 (Ampere)"

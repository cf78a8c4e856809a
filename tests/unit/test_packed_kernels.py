"""The CUDA kernels but for CUDA: any mask as packed calls, the choice of a kernel, and its check against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_kernels import CASES, Case, assert_close, draw, expected_of
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels import attention, selfcheck, varlen
from roformer_dist.kernels.attention import HeadShape, choose_kernel
from roformer_dist.kernels.packed import UNBOUNDED, packed_calls
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.kernels.selfcheck import check_kernel, check_rotation
from roformer_dist.kernels.varlen import Packing, VarlenKernel

CPU = torch.device("cpu")


class PackedOnCpu:
    """What flash-attn documents of its packed kernel, written out densely: bands counted from the ends."""

    name = "packed-on-cpu"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert q.shape[-1] % 8 == 0
        assert all(x.is_contiguous() for x in (q, k, v))
        out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
        for rows, columns, hidden in self._documents(packing):
            scores = self._scores(q[rows], k[columns], hidden, scale)
            seen = ~hidden.all(-1)
            lse[:, rows][:, seen] = scores.logsumexp(-1)[:, seen].float()
            p = scores.softmax(-1).nan_to_num(0)
            out[rows] = torch.einsum("ntu,und->tnd", p, self._wide(v[columns], q)).to(q.dtype)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What a kernel that was given uninitialised memory leaves where it did not write.
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        assert lse.is_contiguous()
        for rows, columns, hidden in self._documents(packing):
            scores = self._scores(q[rows], k[columns], hidden, scale)
            p = (scores - lse[:, rows, None].double()).exp()
            wide_k, wide_v = self._wide(k[columns], q), self._wide(v[columns], q)
            do, o = dout[rows].double(), out[rows].double()
            ds = p * (torch.einsum("tnd,und->ntu", do, wide_v) - (do * o).sum(-1).T[..., None]) * scale
            dq[rows] = torch.einsum("ntu,und->tnd", ds, wide_k).to(q.dtype)
            dk[columns] = self._narrow(torch.einsum("ntu,tnd->und", ds, q[rows].double()), k)
            dv[columns] = self._narrow(torch.einsum("ntu,tnd->und", p, do), v)
        return dq, dk, dv

    def _documents(self, packing: Packing) -> list[tuple[slice, slice, Tensor]]:
        left, right = packing.call.left, packing.call.right
        assert min(left, right) >= UNBOUNDED
        found = []
        cu_q, cu_k = packing.cu_q.tolist(), packing.cu_k.tolist()
        for i in range(len(cu_q) - 1):
            t, u = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
            assert 0 < t <= packing.max_q
            assert 0 < u <= packing.max_k
            ahead = torch.arange(u) - (torch.arange(t)[:, None] + u - t)
            hidden = torch.zeros(t, u, dtype=torch.bool)
            hidden |= (ahead > right) if right != UNBOUNDED else hidden
            hidden |= (ahead < -left) if left != UNBOUNDED else hidden
            found.append((slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1]), hidden))
        return found

    def _scores(self, q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
        scores = torch.einsum("tnd,und->ntu", q.double(), self._wide(k, q)) * scale
        return scores.masked_fill(hidden, -torch.inf)

    def _wide(self, x: Tensor, q: Tensor) -> Tensor:
        return x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    def _narrow(self, x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


def check(case: Case, seed: int = 0) -> None:
    q, k, v, dout = draw(case, torch.float32, seed)
    kernel = VarlenKernel(PackedOnCpu())
    mask = case.mask
    out, lse = kernel.forward(q, k, v, mask, 0.6)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, mask, 0.6)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_close(found, expected_of(case, q, k, v, dout), 3e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_any_mask_is_packed_calls(case: Case) -> None:
    check(case)


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7)),
        min_size=1,
        max_size=5,
    ),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
)
@hypothesis_settings(max_examples=150)
def test_any_documents_offsets_and_windows(
    documents: list[tuple[int, int, int, int]],
    causal: bool,
    window: int | None,
    num_kv_heads: int,
    group: int,
) -> None:
    check(Case(tuple(documents), causal, window, num_kv_heads * group, num_kv_heads))


@pytest.mark.parametrize("head_dim", [2, 12, 16])
def test_head_dims_that_kernels_do_not_have_are_padded(head_dim: int) -> None:
    mask = MaskSpec.from_lengths([5, 3], causal=True)
    q, k, v, dout = (torch.randn(8, 2, head_dim) for _ in range(4))
    results = []
    for kernel in (VarlenKernel(PackedOnCpu()), ReferenceKernel()):
        out, lse = kernel.forward(q, k, v, mask, 0.3)
        results.append((out, lse, *kernel.backward(dout, q, k, v, out, lse, mask, 0.3)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("mask", "bands"),
    [
        (MaskSpec.from_lengths([4, 1, 7, 1], causal=True), [(UNBOUNDED, 0)]),
        (MaskSpec.from_lengths([4, 1, 7, 1], causal=False), [(UNBOUNDED, UNBOUNDED)]),
        (MaskSpec.from_lengths([9, 1, 2, 7], causal=True, window=3), [(2, 0)]),
        (MaskSpec.from_lengths([9, 1, 2, 7], causal=False, window=3), [(2, 2)]),
    ],
)
def test_self_attention_is_one_call_without_gathering(mask: MaskSpec, bands: list[tuple[int, int]]) -> None:
    calls = packed_calls(mask)
    tokens = int(mask.cu_seqlens_q[-1])
    assert [(c.left, c.right) for c in calls] == bands
    assert all(c.covers(tokens, tokens) for c in calls)


def test_a_mask_is_packed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, pack = [], varlen._pack
    monkeypatch.setattr(varlen, "_pack", lambda *given: packed.append(given) or pack(*given))
    kernel, x = VarlenKernel(PackedOnCpu()), torch.randn(12, 1, 8)
    masks = [MaskSpec.from_lengths([5, 7], causal=True, window=window) for window in (None, 3)]
    for mask in masks * 3:
        out, lse = kernel.forward(x, x, x, mask, 1.0)
        kernel.backward(x, x, x, x, out, lse, mask, 1.0)
    assert len(packed) == 2


@pytest.mark.parametrize("kernel", [SdpaKernel(), VarlenKernel(PackedOnCpu())], ids=lambda k: k.name)
def test_the_self_check_passes_what_is_right(kernel: attention.Kernel) -> None:
    assert check_kernel(kernel, CPU, torch.bfloat16) is None
    assert check_rotation(CPU, torch.bfloat16) is None


class Faulty(PackedOnCpu):
    """A kernel with one planted fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        if self.fault == "aborts":
            raise RuntimeError("no kernel image\nis available")
        out, lse = super().forward(q, k, v, packing, scale)
        return out, lse * (1.1 if self.fault == "lse" else 1)

    def backward(self, *args: Tensor | Packing | float) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*args)  # pyright: ignore[reportArgumentType]
        return (
            dq,
            dk * (0.9 if self.fault == "dk" else 1),
            dv.nan_to_num(0) * (torch.nan if self.fault == "nan" else 1),
        )


@pytest.mark.parametrize(
    ("fault", "said"),
    [("lse", "off by"), ("dk", "dk of"), ("nan", "dv of"), ("aborts", "no kernel image is")],
)
def test_the_self_check_refuses_what_is_wrong(fault: str, said: str) -> None:
    trouble = check_kernel(VarlenKernel(Faulty(fault)), CPU, torch.bfloat16)
    assert trouble is not None
    assert said in trouble
    assert "\n" not in trouble


class FaultyAt(PackedOnCpu):
    """A kernel that is wrong for one width of a head, or for one number of query heads on a key/value head."""

    def __init__(self, head_dim: int | None = None, group: int | None = None) -> None:
        self.head_dim, self.group = head_dim, group

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, packing, scale)
        wrong = q.shape[2] == self.head_dim or q.shape[1] // k.shape[1] == self.group
        return (out * 1.1 if wrong else out), lse


@pytest.mark.parametrize(
    ("fault", "heads", "checked"),
    [
        ({"head_dim": 128}, HeadShape(32, 8, 128), "8 heads on 2 of 128"),
        ({"group": 6}, HeadShape(6, 1, 64), "6 heads on 1 of 64"),
    ],
    ids=str,
)
def test_the_self_check_takes_the_models_heads(
    fault: dict[str, int], heads: HeadShape, checked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "TorchFlash", lambda: FaultyAt(**fault))
    monkeypatch.setattr(attention, "torch_flash_missing", lambda device: None)
    # Everything of the choice but the device.
    choose = partial(attention._cuda_kernel, "varlen", CPU, torch.bfloat16)
    assert choose(HeadShape())[0].name == "packed-on-cpu"
    with pytest.raises(ValueError, match=f"out of causal documents, {checked}, is off by"):
        choose(heads)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a GPU, as far as the choice can tell; arguments say what is missing or fails."""

    def pretend(
        varlen: str | None = None, flash_attn: str | None = None, rotation: str | None = None
    ) -> None:
        faults = {"varlen": varlen, "flash_attn": flash_attn}
        monkeypatch.setattr(attention, "torch_flash_missing", lambda device: None)
        monkeypatch.setattr(attention, "flash_attn_missing", lambda device: None)
        monkeypatch.setattr(
            selfcheck, "check_kernel", lambda kernel, device, dtype, heads: faults[kernel.name]
        )
        monkeypatch.setattr(selfcheck, "check_rotation", lambda device, dtype: rotation)

    return pretend


def test_auto_takes_the_first_kernel_that_passes_and_says_what_did_not(cuda: Callable[..., None]) -> None:
    cuda()
    kernel, why = choose_kernel("auto", "cuda")
    assert (kernel.name, why) == (
        "varlen",
        "the first that passes: forward and gradients agree with float64 on this device",
    )
    cuda(varlen="dk is off")
    kernel, why = choose_kernel("auto", "cuda")
    assert kernel.name == "flash_attn"
    assert "varlen: dk is off" in why
    assert choose_kernel("flash_attn", "cuda")[1].startswith("asked for")


def test_no_unproven_kernel_is_used(cuda: Callable[..., None]) -> None:
    cuda(varlen="dk is off", flash_attn="dq is off")
    with pytest.raises(
        ValueError, match="'auto' has no kernel on cuda: varlen: dk is off; flash_attn: dq is off"
    ):
        choose_kernel("auto", "cuda")
    with pytest.raises(ValueError, match="'varlen' has no kernel on cuda: varlen: dk is off"):
        choose_kernel("varlen", "cuda")
    cuda(rotation="pairing half is off by 0.1")
    with pytest.raises(ValueError, match=r"rotation on cuda fails.*pairing half"):
        choose_kernel("auto", "cuda")


def test_a_missing_package_is_refused_with_the_line_that_installs_it(
    cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attention.flash_attn_missing
    cuda()
    monkeypatch.setattr(attention, "flash_attn_missing", real)
    with pytest.raises(
        ValueError, match=r"not installed: pip install .flash-attn>=2.8,<3. --no-build-isolation"
    ):
        choose_kernel("flash_attn", "cuda")


def test_an_old_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.metadata, "version", lambda name: "2.7.4.post1")
    assert "flash-attn 2.7.4.post1 is older than 2.8" in str(attention.flash_attn_missing(CPU))


def test_float32_on_cuda_is_refused(cuda: Callable[..., None]) -> None:
    cuda()
    with pytest.raises(
        ValueError, match=r'computes in bf16, not in torch\.float32; set train\.precision = "bf16"'
    ):
        choose_kernel("auto", "cuda", torch.float32)


@pytest.mark.parametrize(("name", "device"), [("varlen", "cpu"), ("flash_attn", "cpu"), ("sdpa", "cuda")])
def test_a_kernel_of_another_device_is_refused_with_what_runs_there(name: str, device: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}. does not run on device .{device}.; there it may be auto"):
        choose_kernel(name, device)

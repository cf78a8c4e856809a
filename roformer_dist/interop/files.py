"""Safetensors folders: read without loading them, written shard by shard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roformer_dist.interop.settings import HuggingFaceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INSTALL = "pip install 'roformer-dist[hf]'"
_DTYPES = ("F32", "BF16", "F16")  # what float32 holds exactly


class TensorFiles:
    """The tensors of a model folder.

    Attributes:
        folder: where they are.
        shapes: by name.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            HuggingFaceError: there are none, only pickled ones, or a file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        for file in self._file_names():
            try:
                opened = safe_open(folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise HuggingFaceError(f"{folder / file}: {error}; download the model again") from None
            for name in opened.keys():  # noqa: SIM118
                if name in self._open:
                    raise HuggingFaceError(f"{folder / file}: weight {name} is in another file too")
                self._open[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def stored(self, name: str) -> Tensor:
        """One tensor as it is in the file."""
        return self._open[name].get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor in float32.

        Raises:
            HuggingFaceError: it is not of a dtype that float32 holds exactly, or a value is NaN or infinite.
        """
        dtype = self._open[name].get_slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise HuggingFaceError(
                f"{self.folder}: weight {name} is stored as {dtype}, and only {', '.join(_DTYPES)} are taken; convert "
                "the model with transformers: from_pretrained with dtype=torch.float32, then save_pretrained"
            )
        tensor = self.stored(name).to(torch.float32)
        if not tensor.isfinite().all():
            raise HuggingFaceError(
                f"{self.folder}: weight {name} holds values that are NaN or infinite; a model computes nothing with "
                "them: download it again, or take another checkpoint of it"
            )
        return tensor

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                if not all(Path(name).name == name for name in names):  # a file beside it, and nowhere else
                    raise ValueError
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise HuggingFaceError(
                    f"{index}: not an index of weights; download the model again"
                ) from None
            if SINGLE not in names and (self.folder / SINGLE).is_file():
                raise HuggingFaceError(
                    f"{self.folder}: {SINGLE} and {INDEX} are two models, of which transformers reads the first; "
                    "remove the one that is not meant"
                )
            return sorted(names)
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickled = sorted(path.name for path in self.folder.glob("*.bin"))
        if pickled:
            raise HuggingFaceError(
                f"{self.folder / pickled[0]}: pickled weights run code when they are read; only safetensors are taken: "
                "convert the model where you trust it, with transformers' save_pretrained"
            )
        raise HuggingFaceError(f"{self.folder}: no {SINGLE} and no {INDEX} in it")


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_size: str) -> Any:
    """Which tensors go into which file of at most ``max_shard_size``, such as ``5GB``; for ``write_shards``.

    Raises:
        HuggingFaceError: a size that cannot be read.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", max_shard_size, re.IGNORECASE):
        raise HuggingFaceError(
            f"--max-shard-size {max_shard_size}: not a size; give one such as 5GB or 500MB"
        )
    described = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return split_torch_state_dict_into_shards(described, max_shard_size=max_shard_size)


def write_shards(
    folder: Path, tensors: Mapping[str, Callable[[], Tensor]], plan: Any, dtype: torch.dtype
) -> list[str]:
    """Write ``tensors`` as ``dtype`` into the files of ``plan``; the files' names.

    Raises:
        HuggingFaceError: a weight that ``dtype`` cannot hold.
    """
    from safetensors.torch import save_file

    for file, names in plan.filename_to_tensors.items():
        # One shard in memory at a time; contiguous copies, because tied tensors may not share memory in a file.
        made = {name: _as_dtype(name, tensors[name](), dtype) for name in names}
        save_file(made, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(plan.filename_to_tensors)


def _as_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    made = tensor.to(dtype).clone(memory_format=torch.contiguous_format)
    if not made.isfinite().all():
        largest, limit = tensor.abs().max().item(), torch.finfo(dtype).max
        wanted = str(dtype).removeprefix("torch.")
        if not math.isfinite(largest):
            raise HuggingFaceError(
                f"weight {name} of the checkpoint holds values that are NaN or infinite; take an earlier checkpoint"
            )
        raise HuggingFaceError(
            f"--dtype {wanted}: weight {name} reaches {largest:.4g}, and {wanted} ends at {limit:.4g}; give another"
        )
    return made

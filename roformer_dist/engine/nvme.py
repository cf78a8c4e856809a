"""Optimizer states and parameters on a disk: what DeepSpeed's swapper needs, and a folder for each engine."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roformer_dist.config.parallel import ParallelConfig

# Adam swaps four tensors of a group at once: the weights, their gradient and two moments.
BUFFERS = 4
# Elements that are swapped and stepped together, to within a parameter: 512 MiB of buffers a process. DeepSpeed's
# default, 1e9, would keep the whole share of most runs in buffers.
SUB_GROUP = 2**25
# Parameters whose shares are in memory at once, in a buffer each of the size of the largest share: the output layer's
# for a whole pass, an MLP's three, which are fetched together, and one more for what is fetched beside them.
PARAMETER_BUFFERS = 5


def swap_folder(parallel: ParallelConfig) -> tempfile.TemporaryDirectory[str] | None:
    """A fresh folder in ``nvme_path``, removed with the object, so that two runs never share swap files."""
    if parallel.nvme_path is None:
        return None
    return tempfile.TemporaryDirectory(prefix="swap-", dir=parallel.nvme_path)


def put_on_disk(network: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Cast the parameters to ``dtype`` and leave this process's shares in files, as ``deepspeed.initialize`` is to.

    It would itself, but on a processor without fp16 arithmetic in bf16, whatever ``dtype`` is (``Init._set_dtype``);
    told of no dtype, ``Init`` reads it from ``settings``, DeepSpeed's dictionary.
    """
    import deepspeed

    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=network, config_dict_or_path=settings)


def check_nvme(path: str) -> None:
    """Refuse a directory or a machine on which the swapper would not run; compile its operator if that is still to do.

    Raises:
        ValueError: one line: what is missing, and what to install or set.
    """
    _check_directory(path)
    _check_operator(path)


def _check_directory(path: str) -> None:
    where = f"parallel.nvme_path = {path!r}"
    if not os.path.isdir(path):
        raise ValueError(f"{where} is no directory on this node; make it, or name one that is there")
    try:
        with tempfile.NamedTemporaryFile(prefix="probe-", dir=path) as probe:
            direct = getattr(os, "O_DIRECT", None)  # Linux's alone, as libaio is
            if direct is not None:
                os.close(os.open(probe.name, os.O_RDWR | direct))
    except OSError as error:
        raise ValueError(
            f"{where}: a file there cannot be written around the page cache ({error.strerror}); name a writable "
            'directory on a local disk, or offload to "cpu"'
        ) from None


def _check_operator(path: str) -> None:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    if not installed_ops.get("async_io", False):
        builder = AsyncIOBuilder()
        for found, missing, fix in (
            (shutil.which(os.environ.get("CXX", "c++")), "a C++ compiler", "apt-get install g++"),
            (shutil.which("ninja"), "ninja on the PATH", "activate the environment it is installed in"),
            (builder.is_compatible(), "libaio and its header", "apt-get install libaio-dev"),
        ):
            if not found:
                raise ValueError(
                    f"parallel.nvme_path = {path!r}: DeepSpeed compiles its async_io operator and needs {missing}, "
                    f'which is not there; {fix}, or offload to "cpu"'
                )
        _announce_compilation()
    try:
        AsyncIOBuilder().load(verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"parallel.nvme_path = {path!r}: DeepSpeed's async_io operator cannot be compiled or loaded: {cause[0]}; "
            'repair that, or offload to "cpu"'
        ) from None


def _announce_compilation() -> None:
    """Say on one process of a node, before it happens, that the first start compiles for minutes."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("async_io", verbose=False))
    if not (folder / "async_io.so").exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"offload to NVMe: compiling DeepSpeed's async_io operator into {folder}, once on this machine; "
            "this takes minutes, half an hour on two busy cores",
            file=sys.stderr,
            flush=True,
        )

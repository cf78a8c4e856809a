"""ZeRO's switches: as DeepSpeed's dictionary, and what they need of the machine that they are to run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from roformer_dist.config.parallel import ParallelConfig
from roformer_dist.engine.nvme import BUFFERS, PARAMETER_BUFFERS, SUB_GROUP, check_nvme


def zero_optimization(parallel: ParallelConfig, largest_share: int = 0) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization``: the stage and, each only where it is set, the switches (pure).

    Args:
        largest_share: elements that a process holds of the largest parameter, for parameters on a disk.
    """
    section: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload_optimizer != "none":
        section["offload_optimizer"] = {"device": parallel.offload_optimizer}
    if parallel.offload_optimizer == "nvme":
        section["offload_optimizer"] |= {"nvme_path": parallel.nvme_path, "buffer_count": BUFFERS}
    if parallel.nvme_path is not None:
        section["sub_group_size"] = SUB_GROUP
    if parallel.offload_parameters != "none":
        section["offload_param"] = {"device": parallel.offload_parameters}
    if parallel.offload_parameters == "nvme":
        # By default the first 1e9 elements would stay in memory.
        section["offload_param"] |= {"nvme_path": parallel.nvme_path, "max_in_cpu": 0}
        section["offload_param"] |= {"buffer_count": PARAMETER_BUFFERS, "buffer_size": largest_share}
        # What is fetched ahead, or kept because it is soon used again, holds a buffer: most networks as a whole.
        section |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    if parallel.hpz_partition_size > 1:
        section["zero_hpz_partition_size"] = parallel.hpz_partition_size
    if parallel.quantized_weights:
        section["zero_quantized_weights"] = True
    if parallel.quantized_gradients:
        section["zero_quantized_gradients"] = True
    return section


def describe(parallel: ParallelConfig) -> str:
    """The stage and the switches in words, for the console (pure)."""
    places = {"optimizer": parallel.offload_optimizer, "parameters": parallel.offload_parameters}
    kinds = {"weights": parallel.quantized_weights, "gradients": parallel.quantized_gradients}
    quantized = [name for name, on in kinds.items() if on]
    words: list[str] = []
    for place, where in (("cpu", "in host memory"), ("nvme", f"in {parallel.nvme_path}")):
        offloaded = [name for name, chosen in places.items() if chosen == place]
        words += [f"{' and '.join(offloaded)} {where}"] if offloaded else []
    words += [f"hpZ over {parallel.hpz_partition_size}"] if parallel.hpz_partition_size > 1 else []
    words += [f"{' and '.join(quantized)} quantized"] if quantized else []
    return f"ZeRO-{parallel.zero_stage}" + (f" ({', '.join(words)})" if words else "")


def check_machine(parallel: ParallelConfig, device_type: str, world_size: int, local_size: int) -> None:
    """Refuse switches that DeepSpeed would ignore or stumble over on these devices and nodes.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        local_size: processes on this node.

    Raises:
        ValueError: one line: the key, what it needs, and what to set.
    """
    if parallel.nvme_path is not None:
        check_nvme(parallel.nvme_path)
    size = parallel.hpz_partition_size
    if size > 1 and local_size % size:
        raise ValueError(
            f"parallel.hpz_partition_size = {size} does not divide the {local_size} processes of this node, and "
            f"copies between nodes are what it is there to avoid; take {local_size} or a divisor of it"
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if getattr(parallel, name):
            if device_type != "cuda":
                raise ValueError(
                    f"parallel.{name} = true: DeepSpeed quantizes in CUDA kernels, and this process runs on the "
                    f"{device_type.upper()}; set it to false here"
                )
            _check_quantizer(name)
    if parallel.quantized_gradients:
        _check_nodes(world_size, local_size, torch.cuda.device_count())


def check_partitions(sizes: Mapping[str, int], world_size: int) -> None:
    """Refuse parameters that ``quantized_weights`` cannot quantize: shares that eight does not divide.

    Args:
        sizes: elements of every parameter, by name.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, size in sizes.items():
        share = -(-size // world_size)
        if share % 8:
            raise ValueError(
                f"parallel.quantized_weights = true quantizes in groups of 8, and each of {world_size} processes has "
                f"{share} of the {size} elements of {name}; change the width, or set it to false"
            )


def forget_modules() -> None:
    """Empty what DeepSpeed's ZeRO 3 keeps of every network for the life of the process, and with it the engine."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    # A method's cache without bound, whose keys are modules; a decorator hides it.
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in method.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _check_nodes(world_size: int, local_size: int, devices: int) -> None:
    if world_size == local_size:
        raise ValueError(
            f"parallel.quantized_gradients = true saves traffic between nodes, and all {world_size} processes are on "
            "one, where DeepSpeed reduces as without it; set it to false or start on several nodes"
        )
    if local_size != devices or world_size % local_size:
        raise ValueError(
            f"parallel.quantized_gradients = true needs a process for every GPU of every node; here {local_size} "
            f"of {world_size} processes share a node of {devices} GPUs: start {devices} on each, or set it to false"
        )


def _check_quantizer(name: str) -> None:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise ValueError(
            f"parallel.{name} = true compiles DeepSpeed's quantizer at the first start and needs nvcc; install the "
            "CUDA toolkit and set CUDA_HOME, or set it to false"
        )

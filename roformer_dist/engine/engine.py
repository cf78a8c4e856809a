"""The one door to DeepSpeed: from sums to the scalar it averages, and the optimizer step."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roformer_dist.batch import Batch
from roformer_dist.config.derive import RunShape
from roformer_dist.config.schema import Config
from roformer_dist.engine.deepspeed_config import Precision, deepspeed_config
from roformer_dist.engine.nvme import put_on_disk, swap_folder
from roformer_dist.engine.optimizer import build_optimizer
from roformer_dist.engine.ranks import Ranks
from roformer_dist.engine.zero import forget_modules
from roformer_dist.kernels.attention import SequenceOps
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import RoFormer
from roformer_dist.objectives import SummedLoss

# Long enough for a slow file system at start-up, short enough that a lost peer is noticed.
GROUP_TIMEOUT = timedelta(minutes=10)


def start_process_group(ranks: Ranks) -> torch.device:
    """Join the other processes through DeepSpeed; returns this process's device.

    Raises:
        OSError: the meeting place is taken or cannot be reached.
    """
    device = choose_device(ranks.local_rank)
    _quiet_deepspeed(device)
    import deepspeed

    if device.type == "cpu":
        # A fast path that would compile for a minute, and fail where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(
        RANK=str(ranks.rank),
        LOCAL_RANK=str(ranks.local_rank),
        WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=str(ranks.master_port),
    )
    backend = "gloo" if device.type == "cpu" else "nccl"
    try:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=GROUP_TIMEOUT, verbose=False
        )
    except dist.DistNetworkError as error:
        raise OSError(
            f"the processes cannot meet at {ranks.master_addr}:{ranks.master_port} (MASTER_ADDR, MASTER_PORT): "
            f"{error}; give a port that is free on that host"
        ) from None
    return device


def stop_process_group() -> None:
    """Leave the group; skipping this once aborted a process that was already done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU where there is none or DS_ACCELERATOR asks for it."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        nll_sum: float64 scalar, this rank's part of the summed loss.
        num_valid: this rank's part of the step's targets; a fraction where several ranks share one.
        grad_norm: norm of the whole gradient before clipping, the same on every rank.
    """

    nll_sum: float
    num_valid: float
    grad_norm: float


class Engine:
    """A network under DeepSpeed.

    The loss of a step is the sum of all its targets' losses over their number, whatever rows,
    micro-batches and ranks they are spread over. DeepSpeed averages gradients over all ranks and
    micro-batches, so each micro-batch's scalar is ``nll_sum * loss_scale``.
    """

    def __init__(
        self, config: Config, shape: RunShape, precision: Precision, network: RoFormer, ops: SequenceOps
    ) -> None:
        import deepspeed

        self.shape = shape
        self.ops = ops
        self.network = network
        self.device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
        self._zero_stage = config.parallel.zero_stage
        self._swap = swap_folder(config.parallel)
        if self._swap is not None:
            parallel = config.parallel.model_copy(update={"nvme_path": self._swap.name})
            config = config.model_copy(update={"parallel": parallel})
        apply_options(network, config.train, self.device)
        fused = config.parallel.offload_optimizer != "none"
        optimizer = build_optimizer(network, config.optimizer, fused=fused)
        largest = max(parameter.numel() for parameter in network.parameters())
        settings = deepspeed_config(config, shape, precision, largest)
        if config.parallel.offload_parameters == "nvme":
            put_on_disk(network, settings, torch.bfloat16 if precision == "bf16" else torch.float32)
        # Any: DeepSpeed's declared types are wider than what initialize returns.
        self.deepspeed: Any = deepspeed.initialize(
            model=SummedLoss(network, z_loss=config.train.z_loss), optimizer=optimizer, config=settings
        )[0]

    def step(self, micro_batches: Sequence[Batch], num_valid: int, lr: float) -> StepResult:
        """Forward, backward and update on this rank's slices of one step.

        Args:
            micro_batches: as many as the accumulation, already sliced for this rank.
            num_valid: targets of the whole step: all rows, micro-batches and ranks.
            lr: learning rate of this update.
        """
        nll_sum, valid = self.forward_backward(micro_batches, num_valid)
        return StepResult(nll_sum, valid, self.update(lr))

    def forward_backward(self, micro_batches: Sequence[Batch], num_valid: int) -> tuple[float, float]:
        """Accumulate the step's gradient; this rank's ``(nll_sum, num_valid)``. ``update`` must follow."""
        engine, shape = self.deepspeed, self.shape
        if len(micro_batches) != shape.gradient_accumulation_steps:
            raise ValueError(
                f"{len(micro_batches)} micro-batches for {shape.gradient_accumulation_steps} accumulation steps"
            )
        scale = loss_scale(shape, num_valid)
        nll_total, valid_total = 0.0, 0.0
        engine.train()
        for index, batch in enumerate(micro_batches):
            if index:
                engine.step()  # between micro-batches it only counts
            nll_sum, valid = engine(batch.to(self.device), self.ops)
            engine.backward(nll_sum * scale)
            nll_total += float(nll_sum.detach())
            valid_total += float(valid)
        return nll_total, valid_total

    def update(self, lr: float) -> float:
        """Clip, step the optimizer at ``lr``, clear the gradient; the gradient's norm before clipping."""
        engine = self.deepspeed
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        # Without ZeRO every rank holds the averaged gradient, and DeepSpeed reports no norm of it.
        whole = self._whole_grad_norm() if self._zero_stage == 0 else None
        engine.step()
        return float(engine.get_global_grad_norm()) if whole is None else whole

    def close(self) -> None:
        """Take DeepSpeed off the network and let go of both, where another engine is to follow in this process."""
        self.deepspeed.destroy()
        if self._zero_stage == 3:
            forget_modules()
        if self._swap is not None:
            self._swap.cleanup()

    def _whole_grad_norm(self) -> float:
        norms = [p.grad.double().norm() for p in self.network.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """This rank's ``(nll_sum, num_valid)`` over batches already sliced for it."""
        self.deepspeed.eval()
        nll_total, valid_total = 0.0, 0.0
        for batch in batches:
            nll_sum, valid = self.deepspeed(batch.to(self.device), self.ops)
            nll_total += float(nll_sum)
            valid_total += float(valid)
        return nll_total, valid_total


def loss_scale(shape: RunShape, num_valid: int) -> float:
    """What a rank multiplies a micro-batch's summed loss by: the only place where a sum becomes a mean.

    ``world_size * accumulation / num_valid``, for gradients that are averaged over all ranks and micro-batches.
    """
    return shape.world_size * shape.gradient_accumulation_steps / num_valid


def parameters(engine: Engine) -> dict[str, Tensor]:
    """A float32 copy of every parameter that the network computes with, by name; all ranks call it together."""
    import deepspeed

    copies: dict[str, Tensor] = {}
    for name, parameter in engine.network.named_parameters():
        # One by one: what is read from a disk has a buffer for each of a few.
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine._zero_stage == 3):
            copies[name] = parameter.detach().float().clone()
    return copies


def gradients(engine: Engine) -> dict[str, Tensor]:
    """The averaged float32 gradient of every parameter, by name, between forward_backward and update."""
    from deepspeed.utils import safe_get_full_grad

    def whole(parameter: Any) -> Tensor:
        grad = parameter.grad if engine._zero_stage == 0 else safe_get_full_grad(parameter)
        assert grad is not None
        return grad.float().clone()

    return {name: whole(parameter) for name, parameter in engine.network.named_parameters()}


def master_parameters(engine: Engine) -> dict[str, Tensor]:
    """A copy of every float32 weight that the optimizer keeps, by name; all ranks call it together."""
    from deepspeed.utils import safe_get_full_fp32_param

    def whole(parameter: Any) -> Tensor:
        weight = parameter if engine._zero_stage == 0 else safe_get_full_fp32_param(parameter)
        assert weight is not None
        return weight.detach().float().clone()

    return {name: whole(parameter) for name, parameter in engine.network.named_parameters()}


def _quiet_deepspeed(device: torch.device) -> None:
    """DeepSpeed's own narration is for its developers; warnings still pass."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"torch\.distributed|deepspeed")

"""Optimizer states on a disk: against plain PyTorch and against host memory, and checkpoints between the two.

Without libaio there is nothing to run, and the start's refusal is what is tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor
from training import ROWS, join, make_config, make_rows, train_plainly

from roformer_dist.engine.checkpoint import CheckpointReader
from roformer_dist.engine.checkpoint_files import KINDS
from roformer_dist.engine.nvme import check_nvme

STEPS = 4
# DeepSpeed swaps groups from 262,144 elements up: here the matrices' two or three of a rank, not the vectors'.
WIDE = {"model__hidden_size": 256, "model__intermediate_size": 1024, "model__init_std": 0.02}
SUB_GROUP = 300_000


def _configure(place: str, folder: Path, **changes: Any) -> Any:
    nvme_path = {"parallel__nvme_path": str(folder)} if place == "nvme" else {}
    offload = {"parallel__zero_stage": 3, "parallel__offload_optimizer": place, **nvme_path}
    return make_config(**{"train__micro_batch_size": ROWS, **WIDE, **offload, **changes})


class _Run:
    """An engine, this rank's batches of a step and what came of them."""

    def __init__(self, config: Any, scale: float = 1.0) -> None:
        from roformer_dist.config import derive
        from roformer_dist.engine.engine import Engine
        from roformer_dist.kernels.attention import choose_kernel
        from roformer_dist.model.roformer import build_model
        from roformer_dist.parallel.comm import GroupComm
        from roformer_dist.parallel.mesh import build_mesh
        from roformer_dist.parallel.sequence_ops import sequence_ops

        self.config = config
        self.mesh = build_mesh(GroupComm(), ulysses_size=2, ring_size=1)
        ops, self.layout = sequence_ops(choose_kernel("sdpa", "cpu")[0], self.mesh, 1)
        network = build_model(config.model, masked=False, seed=config.train.seed)
        for parameter in network.parameters():
            parameter.data *= scale
        self.engine = Engine(config, derive(config, 2), "fp32", network, ops)
        self.gradients: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> None:
        from roformer_dist.engine.engine import gradients
        from roformer_dist.engine.schedule import learning_rate

        for step in range(first, last):
            rows, num_valid = make_rows(step)
            batch = self.layout.slice(join(rows), self.mesh.sp.rank)
            nll_sum, _ = self.engine.forward_backward([batch], num_valid)
            self.gradients = self.gradients or gradients(self.engine)
            self.engine.update(learning_rate(self.config, step))
            total = self.mesh.world.all_sum(torch.tensor(nll_sum, dtype=torch.float64))
            self.losses.append(float(total) / num_valid)

    def save(self, folder: Path, step: int) -> None:
        from roformer_dist.engine.checkpoint import CheckpointWriter
        from roformer_dist.engine.fragments import engine_fragments, optimizer_step

        deepspeed = self.engine.deepspeed
        writer = CheckpointWriter(folder, rank=self.mesh.world.rank, world_size=2, keep=9)
        writer.save(
            step, engine_fragments(deepspeed), {}, optimizer_step=optimizer_step(deepspeed), background=False
        )
        torch.distributed.barrier()

    def load(self, checkpoint: Path) -> None:
        from roformer_dist.engine.fragments import load_engine

        load_engine(self.engine.deepspeed, CheckpointReader(checkpoint))

    def parameters(self) -> dict[str, Tensor]:
        from roformer_dist.engine.engine import master_parameters

        return master_parameters(self.engine)

    def on_disk(self) -> int:
        """Bytes of this rank's swap files, the gradients' apart."""
        assert self.engine._swap is not None
        files = Path(self.engine._swap.name).rglob("*.swp")
        return sum(file.stat().st_size for file in files if "gradient" not in file.name)


def _train_all(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from roformer_dist.engine import zero

    zero.SUB_GROUP = SUB_GROUP
    found: dict[str, Any] = {}
    for place in ("cpu", "nvme"):
        run = _Run(_configure(place, folder))
        run.save(folder / place, 0)  # before the first step, when there are no moments
        run.train(0, 2)
        run.save(folder / place, 2)
        if place == "nvme":
            run.train(2, STEPS)
            found["bytes"] = run.on_disk()
            owners = run.engine.deepspeed.optimizer.fp32_partitioned_groups_flat
            found["resident"] = sum(owner.numel() for owner in owners)
        found[place] = {"losses": run.losses, "gradients": run.gradients, "parameters": run.parameters()}
        run.engine.close()
    run = _Run(_configure("nvme", folder), scale=0.5)
    run.load(folder / "cpu" / "step_000002")
    run.save(folder / "loaded", 2)
    run.train(2, STEPS)
    found["continued"] = {"losses": run.losses, "parameters": run.parameters()}
    run.engine.close()
    found["left"] = [path.name for path in folder.glob("swap-*")]
    return found if rank == 0 else {}


@pytest.mark.slow
def test_on_a_disk_it_is_the_same_training(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        with pytest.raises(ValueError, match=r"needs .*; .* or set offload_optimizer = \"cpu\""):
            check_nvme(str(tmp_path))
        return
    check_nvme(str(tmp_path))  # compiles the operator where that is still to do
    found = run_ranks(2, _train_all, tmp_path)[0]
    plain = train_plainly(make_config(**WIDE), STEPS)
    ours = found["nvme"]
    whole = torch.stack([grad.norm() for grad in plain["gradients"].values()]).norm()
    for name, expected in plain["gradients"].items():
        bound = 1e-5 * max(expected.norm(), 1e-3 * whole)
        assert (ours["gradients"][name] - expected).norm() <= bound, name
    torch.testing.assert_close(ours["losses"], plain["losses"], rtol=2e-5, atol=0)
    for name, expected in plain["parameters"].items():
        assert (ours["parameters"][name] - expected).norm() <= 1e-4 * expected.norm(), name

    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 1024) // 2
    assert found["bytes"] == 12 * matrices, "a rank's half of the matrices: weights and both moments"
    assert found["resident"] < 0.01 * matrices, "between steps only the vectors are in memory"
    assert found["left"] == []

    for step in (0, 2):
        _same_checkpoint(tmp_path / f"nvme/step_{step:06d}", tmp_path / f"cpu/step_{step:06d}", 2e-6)
    _same_checkpoint(tmp_path / "loaded/step_000002", tmp_path / "cpu/step_000002", 0.0)
    torch.testing.assert_close(found["continued"]["losses"], ours["losses"][2:], rtol=2e-5, atol=0)
    for name, expected in ours["parameters"].items():
        assert (found["continued"]["parameters"][name] - expected).norm() <= 1e-4 * expected.norm(), name


def _same_checkpoint(ours: Path, theirs: Path, bound: float) -> None:
    mine, other = CheckpointReader(ours), CheckpointReader(theirs)
    assert mine.optimizer_step == other.optimizer_step
    assert mine.parameters == other.parameters
    for name, shape in other.parameters.items():
        size = int(torch.Size(shape).numel())
        for kind in KINDS:
            expected = other.read(name, kind, 0, size)
            assert (mine.read(name, kind, 0, size) - expected).norm() <= bound * expected.norm(), (name, kind)

"""Optimizer states and parameters on a disk: against plain PyTorch and host memory, and checkpoints between them.

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
from roformer_dist.engine.nvme import PARAMETER_BUFFERS, check_nvme

STEPS = 4
# DeepSpeed swaps groups from 262,144 elements up: here the matrices' two or three of a rank, not the vectors'.
WIDE = {"model__hidden_size": 256, "model__intermediate_size": 1024, "model__init_std": 0.02}
SUB_GROUP = 300_000
# A parameter is swapped from the same 1 MiB up, by itself: here an MLP's three matrices and the embedding, which is the
# output layer too; in fp32 the half that each of two processes has, in bf16 of twice as many. Attention's stay.
SWAPPED = WIDE | {"model__vocab_size": 2048, "model__intermediate_size": 2048}
SWAPPED_BF16 = WIDE | {"model__vocab_size": 4096, "model__intermediate_size": 4096}
PIECES = {"train__micro_batch_size": ROWS // 2, "train__activation_checkpointing": "full"}


def _configure(place: str, folder: Path, parameters: str = "none", **changes: Any) -> Any:
    nvme_path = {"parallel__nvme_path": str(folder)} if "nvme" in (place, parameters) else {}
    offload = {"parallel__offload_optimizer": place, "parallel__offload_parameters": parameters, **nvme_path}
    return make_config(
        **{"train__micro_batch_size": ROWS, "parallel__zero_stage": 3, **WIDE, **offload, **changes}
    )


class _Run:
    """An engine, this rank's batches of a step and what came of them."""

    def __init__(self, config: Any, scale: float = 1.0, precision: Any = "fp32") -> None:
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
        self.engine = Engine(config, derive(config, 2), precision, network, ops)
        self.gradients: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> None:
        from roformer_dist.engine.engine import gradients
        from roformer_dist.engine.schedule import learning_rate

        for step in range(first, last):
            rows, num_valid = make_rows(step)
            size = self.config.train.micro_batch_size
            batches = [join(rows[start : start + size]) for start in range(0, ROWS, size)]
            slices = [self.layout.slice(batch, self.mesh.sp.rank) for batch in batches]
            self.engine.evaluate(
                iter(slices)
            )  # what a validation between steps leaves must not be in the way
            nll_sum, _ = self.engine.forward_backward(slices, num_valid)
            self.gradients = self.gradients or gradients(self.engine)
            self.engine.update(learning_rate(self.config, step))
            total = self.mesh.world.all_sum(torch.tensor(nll_sum, dtype=torch.float64))
            self.losses.append(float(total) / num_valid)

    def save(self, folder: Path, step: int) -> None:
        from roformer_dist.engine.checkpoint import CheckpointWriter
        from roformer_dist.engine.fragments import engine_fragments, optimizer_step

        deepspeed = self.engine.deepspeed
        writer = CheckpointWriter(folder, rank=self.mesh.world.rank, world_size=2, keep=9)
        torch.distributed.barrier()  # it clears what is unfinished
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
        return sum(size for name, size in self._files().items() if "gradient" not in name)

    def parameters_on_disk(self) -> dict[str, int]:
        """Bytes of this rank's swap files of parameters, and its elements of parameters in memory and in buffers."""
        parameters = list(self.engine.network.parameters())
        shares = [p.ds_tensor.numel() for p in parameters if p.ds_tensor.final_location != "nvme"]
        swapped = [p for p in parameters if p.ds_tensor.final_location == "nvme"]
        return {
            "files": sum(size for name, size in self._files().items() if name.endswith("_param.tensor.swp")),
            "in memory": sum(shares),
            "whole": sum(p.numel() for p in swapped),
            "in buffers": len(swapped[0].nvme_swapper.param_id_to_buffer_id),
            "buffers": swapped[0].nvme_swapper.buffers.numel(),
        }

    def _files(self) -> dict[str, int]:
        assert self.engine._swap is not None
        return {file.name: file.stat().st_size for file in Path(self.engine._swap.name).rglob("*.swp")}


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


def _train_parameters(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from roformer_dist.engine import zero
    from roformer_dist.engine.engine import parameters

    zero.SUB_GROUP = SUB_GROUP
    found: dict[str, Any] = {}
    for place, steps in (("nvme", STEPS), ("cpu", 2)):
        run = _Run(_configure(place, folder, "nvme", **SWAPPED, **PIECES))
        run.save(folder / place, 0)
        run.train(0, 2)
        run.save(folder / place, 2)
        run.train(2, steps)
        found[place] = {
            "losses": run.losses,
            "gradients": run.gradients,
            "parameters": parameters(run.engine),
        }
        found[place] |= {"master": run.parameters(), "kept": run.parameters_on_disk()}
        run.engine.close()
    # From a disk to host memory, and from there to a disk under an optimizer elsewhere.
    for place, on, source in (("cpu", "cpu", "nvme/step_000002"), ("none", "nvme", "to cpu/step_000002")):
        run = _Run(_configure(place, folder, on, **SWAPPED), scale=0.5)
        run.load(folder / source)
        run.save(folder / f"to {place}", 2)
        run.train(2, STEPS)
        found[f"to {place}"] = {"losses": run.losses, "parameters": parameters(run.engine)}
        run.engine.close()
    for on in ("none", "nvme"):
        run = _Run(_configure("cpu", folder, on, **SWAPPED_BF16), precision="bf16")
        run.train(0, 1)
        found[f"bf16 {on}"] = {
            "losses": run.losses,
            "gradients": run.gradients,
            "parameters": parameters(run.engine),
        }
        run.engine.close()
    torch.distributed.barrier()
    found["left"] = [path.name for path in folder.glob("swap-*")]
    return found if rank == 0 else {}


def _compiled(folder: Path) -> bool:
    """Compile the operator where that is still to do; where it cannot be, hold the start to its refusal."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        with pytest.raises(ValueError, match=r"needs .*; .* or offload to \"cpu\""):
            check_nvme(str(folder))
        return False
    check_nvme(str(folder))
    return True


def _same_training(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    whole = torch.stack([grad.norm() for grad in plain["gradients"].values()]).norm()
    for name, expected in plain["gradients"].items():
        bound = 1e-5 * max(expected.norm(), 1e-3 * whole)
        assert (ours["gradients"][name] - expected).norm() <= bound, name
    torch.testing.assert_close(ours["losses"], plain["losses"], rtol=2e-5, atol=0)
    _same_parameters(ours["parameters"], plain["parameters"])


def _same_parameters(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
def test_on_a_disk_it_is_the_same_training(tmp_path: Path) -> None:
    if not _compiled(tmp_path):
        return
    found = run_ranks(2, _train_all, tmp_path)[0]
    ours = found["nvme"]
    _same_training(ours, train_plainly(make_config(**WIDE), STEPS))

    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 1024) // 2
    assert found["bytes"] == 12 * matrices, "a rank's half of the matrices: weights and both moments"
    assert found["resident"] < 0.01 * matrices, "between steps only the vectors are in memory"
    assert found["left"] == []

    for step in (0, 2):
        _same_checkpoint(tmp_path / f"nvme/step_{step:06d}", tmp_path / f"cpu/step_{step:06d}", 2e-6)
    _same_checkpoint(tmp_path / "loaded/step_000002", tmp_path / "cpu/step_000002", 0.0)
    torch.testing.assert_close(found["continued"]["losses"], ours["losses"][2:], rtol=2e-5, atol=0)
    _same_parameters(found["continued"]["parameters"], ours["parameters"])


@pytest.mark.slow
def test_parameters_on_a_disk_are_trained_the_same(tmp_path: Path) -> None:
    if not _compiled(tmp_path):
        return
    found = run_ranks(2, _train_parameters, tmp_path, timeout_s=240)[0]
    plain = train_plainly(make_config(**SWAPPED), STEPS)
    share = 2048 * 256 // 2
    _same_training(found["nvme"], plain)
    for place in ("nvme", "cpu"):
        ours = found[place]
        _same_parameters(ours["parameters"], ours["master"])
        assert ours["kept"] == {
            "files": 4 * (2 * 3 + 1) * share,  # the MLPs of two layers and the embedding
            "in memory": 2 * 4 * 256 * 256 // 2 + 5 * 256 // 2,  # the attention and the norms
            "whole": 0,
            "in buffers": 0,
            "buffers": PARAMETER_BUFFERS * share,
        }
    for step in (0, 2):
        _same_checkpoint(tmp_path / f"nvme/step_{step:06d}", tmp_path / f"cpu/step_{step:06d}", 2e-6)
    for place in ("cpu", "none"):
        _same_checkpoint(tmp_path / f"to {place}/step_000002", tmp_path / "nvme/step_000002", 0.0)
        torch.testing.assert_close(found[f"to {place}"]["losses"], plain["losses"][2:], rtol=2e-5, atol=0)
        _same_parameters(found[f"to {place}"]["parameters"], plain["parameters"])
    torch.testing.assert_close(found["bf16 nvme"], found["bf16 none"], rtol=0, atol=0)
    assert found["left"] == []


def _same_checkpoint(ours: Path, theirs: Path, bound: float) -> None:
    mine, other = CheckpointReader(ours), CheckpointReader(theirs)
    assert mine.optimizer_step == other.optimizer_step
    assert mine.parameters == other.parameters
    for name, shape in other.parameters.items():
        size = int(torch.Size(shape).numel())
        for kind in KINDS:
            expected = other.read(name, kind, 0, size)
            assert (mine.read(name, kind, 0, size) - expected).norm() <= bound * expected.norm(), (name, kind)

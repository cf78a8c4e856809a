"""What one mesh saves, any other continues: world sizes 1, 2, 4, ZeRO 0-3, offload, fp32 and bf16, on gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from spawn import run_ranks
from torch import Tensor, nn

from roformer_dist.engine.checkpoint import CheckpointReader, CheckpointWriter, load_parameters
from roformer_dist.engine.checkpoint_files import KINDS, CheckpointError
from roformer_dist.engine.fragments import engine_fragments, load_engine, optimizer_step

WIDTH = 97  # odd: no partition boundary falls on a parameter boundary
STEPS = 3  # before the checkpoint, and again after it
ROWS = 4


class Mesh(NamedTuple):
    """Where a run happens; the name is also the checkpoint's directory."""

    world_size: int
    zero_stage: int
    dtype: str = "fp32"
    switch: str = "plain"  # a key of SWITCHES

    def __str__(self) -> str:
        return f"world{self.world_size}_zero{self.zero_stage}_{self.dtype}_{self.switch}"


OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "optimizer": OPTIMIZER,
    "all": OPTIMIZER | {"offload_param": {"device": "cpu"}},
    "hpz": {"zero_hpz_partition_size": 2},
}


class Model(nn.Module):
    """Odd sizes, a one-element parameter, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, WIDTH)
        self.up = nn.Linear(WIDTH, 53)
        self.down = nn.Linear(53, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 31, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = hidden + self.scale * self.down(torch.tanh(self.up(hidden)))
        return self.head(self.norm(hidden))


def build_engine(mesh: Mesh, seed: int) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model = Model()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": ROWS // mesh.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": mesh.dtype == "bf16"},
        "zero_optimization": {
            "stage": mesh.zero_stage,
            "stage3_param_persistence_threshold": 100,  # biases stay whole, matrices do not
            "sub_group_size": 2000,  # several sub-groups in the first parameter group
            **SWITCHES[mesh.switch],
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(
        groups, lr=1e-2, eps=1e-6, fused=mesh.switch in ("optimizer", "all") or None
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, mesh: Mesh, rank: int, first_step: int) -> list[float]:
    """Three steps on data that depends on the step only; the losses, averaged over the ranks."""
    losses = []
    for step in range(first_step, first_step + STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(31, (ROWS, 12), generator=generator).chunk(mesh.world_size)[rank]
        logits = engine(tokens[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone() / mesh.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def gather_state(engine: Any, mesh: Mesh) -> dict[str, Tensor]:
    """Whole fp32 masters, moments and the model's own weights, by DeepSpeed's functions, not by ours."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if mesh.zero_stage in (1, 2):
        # DeepSpeed links the moments after the first group's first step, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state = {}
    for name, parameter in engine.module.named_parameters():
        if mesh.zero_stage == 0:
            moments = engine.optimizer.state[parameter]
            values = [parameter, *(moments[kind] for kind in KINDS[1:])]
        else:
            values = [safe_get_full_fp32_param(parameter)]
            values += [safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:]]
        for kind, value in zip(KINDS, values, strict=True):
            state[f"{kind}|{name}"] = value.detach().clone()
        with GatheredParameters([parameter], enabled=mesh.zero_stage == 3):
            state[f"model|{name}"] = parameter.detach().clone()
    return state


class Run(NamedTuple):
    """What a rank-0 process reports of three steps and the states around them."""

    losses: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]


def continue_run(engine: Any, mesh: Mesh, rank: int) -> Run:
    start = gather_state(engine, mesh)
    losses = train(engine, mesh, rank, first_step=STEPS)
    return Run(losses, start, gather_state(engine, mesh))


def train_and_save(rank: int, world_size: int, root: Path, meshes: list[Mesh]) -> dict[Mesh, Run]:
    """Three steps, a save in the background, and three more steps while and after it is written."""
    runs = {}
    for mesh in meshes:
        engine = build_engine(mesh, seed=0)
        writer = CheckpointWriter(root / str(mesh), rank=rank, world_size=world_size, keep=2, timeout_s=30)
        train(engine, mesh, rank, first_step=0)
        writer.save(
            STEPS, engine_fragments(engine), {"mesh": str(mesh)}, optimizer_step=optimizer_step(engine)
        )
        runs[mesh] = continue_run(engine, mesh, rank)
        writer.wait()
        engine.destroy()
    return runs


def load_and_train(rank: int, root: Path, pairs: list[tuple[Mesh, Mesh]]) -> dict[tuple[Mesh, Mesh], Run]:
    """For each (saved, loading) pair: a fresh, differently initialised engine, the load, three steps."""
    runs = {}
    for saved, loading in pairs:
        engine = build_engine(loading, seed=1)
        load_engine(engine, CheckpointReader(checkpoint(root, saved)))
        runs[saved, loading] = continue_run(engine, loading, rank)
        groups = (getattr(engine.optimizer, "optimizer", engine.optimizer)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert optimizer_step(engine) == 2 * STEPS
        engine.destroy()
    return runs


def checkpoint(root: Path, mesh: Mesh) -> Path:
    return root / str(mesh) / f"step_{STEPS:06d}"


OFFLOADED = [Mesh(2, 1, switch="optimizer"), Mesh(2, 2, switch="optimizer"), Mesh(2, 3, switch="all")]
HPZ = Mesh(4, 3, switch="hpz")
SAVED = [Mesh(1, 0), *(Mesh(2, stage) for stage in range(4)), *OFFLOADED, Mesh(4, 2), Mesh(4, 3), HPZ]
SAVED_BF16 = [Mesh(2, stage, "bf16") for stage in (1, 2, 3)]
# Grouped by the spawn that runs them; a spawn saves first, so what it loads is its own or an earlier one's.
PAIRS_AT_2 = [
    *((saved, saved) for saved in [*SAVED, *SAVED_BF16] if saved.world_size == 2),
    (Mesh(1, 0), Mesh(2, 3)),
    (Mesh(2, 0), Mesh(2, 3)),
    (Mesh(2, 3), Mesh(2, 0)),
    (Mesh(2, 3), Mesh(2, 2)),
    (Mesh(2, 1), Mesh(2, 3)),
    (Mesh(2, 1, "bf16"), Mesh(2, 3, "bf16")),
    (Mesh(2, 3, "bf16"), Mesh(2, 1)),
    (Mesh(2, 2), Mesh(2, 2, "bf16")),
    (Mesh(2, 1), OFFLOADED[2]),
    (OFFLOADED[2], Mesh(2, 2)),
    (OFFLOADED[1], Mesh(2, 3)),
    (Mesh(2, 3, "bf16"), Mesh(2, 1, "bf16", "optimizer")),
]
PAIRS_AT_4 = [
    (OFFLOADED[0], HPZ),
    (HPZ, Mesh(4, 1)),
    (Mesh(4, 2), Mesh(4, 2)),
    (Mesh(1, 0), Mesh(4, 0)),
    (Mesh(2, 2), Mesh(4, 3)),
    (Mesh(2, 3), Mesh(4, 1)),
    (Mesh(2, 2, "bf16"), Mesh(4, 1, "bf16")),
]
PAIRS_AT_1 = [
    (Mesh(1, 0), Mesh(1, 0)),
    (Mesh(1, 0), Mesh(1, 2)),
    (Mesh(2, 1), Mesh(1, 3)),
    (Mesh(2, 2), Mesh(1, 1)),
    (Mesh(2, 3, "bf16"), Mesh(1, 2, "bf16")),
    (Mesh(4, 2), Mesh(1, 3)),
    (Mesh(4, 3), Mesh(1, 0)),
]
PAIRS = [*PAIRS_AT_2, *PAIRS_AT_4, *PAIRS_AT_1]


class Outcome(NamedTuple):
    root: Path
    original: dict[Mesh, Run]
    continued: dict[tuple[Mesh, Mesh], Run]
    refusals: dict[str, str]


def save_and_load(
    rank: int, world_size: int, root: Path, pairs: list[tuple[Mesh, Mesh]]
) -> tuple[dict[Mesh, Run], dict[tuple[Mesh, Mesh], Run]]:
    meshes = [mesh for mesh in [*SAVED, *SAVED_BF16] if mesh.world_size == world_size]
    meshes = [mesh for mesh in meshes if not checkpoint(root, mesh).exists()]
    torch.distributed.barrier()  # every rank has looked before any saves
    original = train_and_save(rank, world_size, root, meshes)
    torch.distributed.barrier()  # rank 0 has completed every checkpoint
    return original, load_and_train(rank, root, pairs)


def load_and_refuse(
    rank: int, world_size: int, root: Path, pairs: list[tuple[Mesh, Mesh]]
) -> tuple[dict[tuple[Mesh, Mesh], Run], dict[str, str]]:
    return load_and_train(rank, root, pairs), refused_cases(root)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Everything in five spawns: they cost more than what runs inside.

    At world size 2 saving and loading are apart, and build their engines in the same order: in one process the
    last bit of a run depends on the engines before it (seen without any checkpoint), and there it must not.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    original, continued = {}, {}
    for world_size, pairs in ((1, []), (2, []), (2, PAIRS_AT_2), (4, PAIRS_AT_4)):
        saved, loaded = run_ranks(world_size, save_and_load, root, pairs)[0]
        original = saved | original
        continued |= loaded
    loaded, refusals = run_ranks(1, load_and_refuse, root, PAIRS_AT_1)[0]
    return Outcome(root, original, continued | loaded, refusals)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def pair_id(pair: tuple[Mesh, Mesh]) -> str:
    return f"{pair[0]}-to-{pair[1]}"


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_continues_as_if_uninterrupted(outcome: Outcome, pair: tuple[Mesh, Mesh]) -> None:
    expected, got = outcome.original[pair[0]], outcome.continued[pair]
    for key, value in expected.start.items():
        if not key.startswith("model"):
            assert torch.equal(got.start[key].flatten(), value.flatten()), f"{key} changed in the load"
    for key, value in got.start.items():
        if key.startswith("model"):
            master = got.start[key.replace("model", "parameter")]
            assert torch.equal(value, master.reshape(value.shape).to(value.dtype)), f"{key} was not refreshed"
    if pair[0] == pair[1] and pair[0].world_size == 2:
        assert got.losses == expected.losses
        assert [key for key, value in expected.end.items() if not torch.equal(got.end[key], value)] == []
    tolerance = 1e-6 if "bf16" not in {pair[0].dtype, pair[1].dtype} else 3e-2
    assert got.losses == pytest.approx(expected.losses, rel=tolerance)
    for key, value in expected.end.items():
        if key.startswith("parameter"):
            assert relative(got.end[key].flatten(), value.flatten()) < tolerance, key


@pytest.mark.parametrize("mesh", [*SAVED, *SAVED_BF16], ids=str)
def test_holds_the_state_of_its_step(outcome: Outcome, mesh: Mesh) -> None:
    """Training went on while the file was written; the state is that of the save all the same."""
    path, original = checkpoint(outcome.root, mesh), outcome.original
    reader = CheckpointReader(path)
    assert (reader.state, reader.step, reader.optimizer_step) == ({"mesh": str(mesh)}, STEPS, STEPS)
    whole = load_parameters(path)
    assert "head.weight" not in whole, "tied to embedding.weight, which is there"
    for name, shape in reader.parameters.items():
        assert reader.dtypes[name] == {"fp32": "float32", "bf16": "bfloat16"}[mesh.dtype]
        assert torch.equal(whole[name], original[mesh].start[f"parameter|{name}"].reshape(shape))
        for kind in KINDS:
            expected = original[mesh].start[f"{kind}|{name}"].flatten()
            assert torch.equal(reader.read(name, kind, 0, expected.numel()), expected)


def refused_cases(root: Path) -> dict[str, str]:
    """What a user gets wrong, and the message that each raises."""
    import deepspeed

    def message(action: Callable[[], Any]) -> str:
        with pytest.raises(CheckpointError) as error:
            action()
        return str(error.value)

    reader = CheckpointReader(checkpoint(root, Mesh(2, 2)))
    engine = build_engine(Mesh(1, 1), seed=0)
    messages = {}
    reader.parameters["up.weight"] = (53, 98)
    messages["shape"] = message(lambda: load_engine(engine, reader))
    del reader.parameters["up.weight"]
    messages["missing"] = message(lambda: load_engine(engine, reader))
    engine.module.scale.requires_grad_(False)
    messages["frozen"] = message(lambda: list(engine_fragments(engine)))
    engine.destroy()
    model = nn.Linear(3, 3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}},
    )
    messages["bf16 without ZeRO"] = message(lambda: list(engine_fragments(engine)))
    return messages


def test_refusals_name_the_numbers_and_the_fix(outcome: Outcome) -> None:
    messages = outcome.refusals
    assert "up.weight has shape (53, 97) in the model and (53, 98) in the checkpoint" in messages["shape"]
    assert "up.weight is only in the model" in messages["missing"]
    assert "scale is frozen" in messages["frozen"]
    assert "use zero_stage=1" in messages["bf16 without ZeRO"]

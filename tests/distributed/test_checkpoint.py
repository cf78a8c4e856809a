"""What one mesh saves, any other continues: world sizes 1, 2, 4, ZeRO 0-3, fp32 and bf16, on gloo processes."""

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

    def __str__(self) -> str:
        return f"world{self.world_size}_zero{self.zero_stage}_{self.dtype}"


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
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": mesh.dtype == "bf16"},
        "zero_optimization": {
            "stage": mesh.zero_stage,
            "stage3_param_persistence_threshold": 100,  # biases stay whole, matrices do not
            "sub_group_size": 2000,  # several sub-groups in the first parameter group
        },
    }
    if mesh.dtype == "bf16" and mesh.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2, eps=1e-6), config=config
    )
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
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.runtime.zero import GatheredParameters

    state = {}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if mesh.zero_stage == 0:
            owner = parameter
            for low, high in zip(getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", [])):
                owner = next((h for p, h in zip(low, high) if p is parameter), owner)
            values = [owner.detach(), *(inner.state[owner][kind] for kind in KINDS[1:])]
        else:
            if mesh.zero_stage < 3:
                # DeepSpeed links the moments after the first group's first step, when the others have none yet.
                engine.optimizer._hp_optimizer_states_linked = False
                engine.optimizer._lazy_init_hp_params_optimizer_state()
            values = [safe_get_full_fp32_param(parameter)]
            values += [safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:]]
        for kind, value in zip(KINDS, values, strict=True):
            state[f"{kind}|{name}"] = value.detach().clone()
        with GatheredParameters([parameter], enabled=mesh.zero_stage == 3):
            state[f"model|{name}"] = parameter.detach().clone()
    return state

"""The sweep and the gain of context with every row spread over ranks, against one process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.scoring import Scorer
from roformer_dist.extrapolation.context import ContextGain, context_gain
from roformer_dist.extrapolation.result import SweepResult
from roformer_dist.extrapolation.sweep import run_sweep
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.parallel.comm import Comm, SoloComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh

VOCAB, TRAINED = 29, 16
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 40,
    # Wide, so that a context that is cut or turned wrongly shows in the loss.
    "init_std": 0.3,
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "sliding-linear": {"layers": ["sliding", "linear"], "sliding_window": 7},
    "transformed-head": {"head_transform": True, "bias": True, "num_kv_heads": 1},
    "self-extend": {"rope": {"policy": {"kind": "self_extend", "window": 5, "group": 3}}},
    "alibi": {"position": {"kind": "alibi"}},
}
# (Ulysses, ring); with 2 key/value heads, 4 processes of Ulysses share them.
MESHES = {"ulysses": (4, 1), "ring": (1, 4), "hybrid": (2, 2)}
WITHOUT_RING = ("self-extend", "alibi")
CASES = [(m, mesh) for m in MODELS for mesh in MESHES if mesh == "ulysses" or m not in WITHOUT_RING]


class Lists:
    """Documents in memory."""

    def __init__(self, lengths: list[int]) -> None:
        generator = np.random.default_rng(5)
        self.lengths = np.array(lengths)
        self._tokens = [generator.integers(0, VOCAB, length) for length in lengths]

    def read(self, document: int) -> np.ndarray:
        return self._tokens[document]


def packed() -> list[Batch]:
    """Rows of documents of odd lengths, 23 tokens each, which no mesh divides."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows in ([[9, 1, 13], [23]], [[1, 11, 11], [12, 11]]):
        ids = torch.randint(0, VOCAB, (len(rows), 23), generator=generator)
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
        labels = ids.roll(-1, dims=1).masked_fill(positions.roll(-1, dims=1) == 0, IGNORE_INDEX)
        lengths = [n for row in rows for n in row]
        batches.append(Batch(ids, labels, positions, positions, MaskSpec.from_lengths(lengths, causal=True)))
    return batches


def measure(comm: Comm, mesh: tuple[int, int], changes: dict[str, Any]) -> tuple[SweepResult, ContextGain]:
    network = build_model(ModelConfig(**BASE | changes), masked=False, seed=1)
    score = Scorer(SdpaKernel(), build_mesh(comm, ulysses_size=mesh[0], ring_size=mesh[1]))
    methods = ["none"] if "position" in changes else ["none", "linear", "ntk", "yarn"]
    lengths = [8, 16, 33, 47]
    result = run_sweep(
        network,
        score,
        Lists([90, 20, 70, 61]),
        trained_seq_len=TRAINED,
        lengths=lengths,
        methods=methods,
        token_budget=3000,
    )
    return result, context_gain(network, score, packed(), documents=[0, 1, 2, 3, 4, 5, 6, 6, 7])


def numbers(result: SweepResult, gain: ContextGain) -> tuple[np.ndarray, np.ndarray]:
    """Every statistic of a sweep and of a gain of context, in one order: of losses, and of their differences."""
    cells = (*result.by_length, *result.by_position)
    losses = [value for cell in cells for value in asdict(cell.nll).values()]
    differences = [
        value for e in (*(c.minus_cropped for c in cells), gain.gain) for value in asdict(e).values()
    ]
    return np.array([*losses, gain.validation_loss, gain.short_context_loss]), np.array(differences)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_every_statistic_is_that_of_one_process(name: str, mesh: str):
    alone = measure(SoloComm(), (1, 1), MODELS[name])
    found = run_in_process(4, lambda comm: measure(comm, MESHES[mesh], MODELS[name]))
    losses, differences = numbers(*alone)
    # Without rotation there are no methods to compare, and so fewer.
    assert len(losses) + len(differences) > (150 if "position" in MODELS[name] else 200)
    for result, gain in found:
        found_losses, found_differences = numbers(result, gain)
        # One loss is exact to about 1e-6 in float32, and these are means and intervals of many.
        np.testing.assert_allclose(found_losses, losses, rtol=2e-6, atol=2e-6)
        # A difference is as inexact as the losses of 3 to 5 that it is of, however small it is itself.
        np.testing.assert_allclose(found_differences, differences, rtol=2e-6, atol=1e-5)
        assert (gain.targets == alone[1].targets).all()
        assert (gain.previous == alone[1].previous).all()
    first = numbers(*found[0])
    assert all((a == b).all() for each in found for a, b in zip(numbers(*each), first))


def test_a_loss_that_is_not_finite_is_raised_on_every_rank():
    def rank(comm: Comm) -> str:
        network = build_model(ModelConfig(**BASE), masked=False, seed=1)
        with torch.no_grad():
            network.embedding.weight[3] = torch.nan
        score = Scorer(SdpaKernel(), build_mesh(comm, ulysses_size=2))
        with pytest.raises(ValueError, match="not finite") as caught:
            run_sweep(network, score, Lists([90]), trained_seq_len=TRAINED, lengths=[32], methods=["none"])
        return str(caught.value)

    assert len(set(run_in_process(2, rank))) == 1

"""Retrieval with every row and the cache of keys spread over ranks, against one process."""

from __future__ import annotations

import pytest
import torch
from test_spread_sweep import BASE, Lists

from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.scoring import Continuer, Scorer
from roformer_dist.extrapolation.retrieval import RetrievalResult, choose_trials, run_retrieval
from roformer_dist.extrapolation.sweep import Grid
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.parallel.comm import Comm, SoloComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh

GRID = Grid(32, (48, 67), ("none", "ntk"))


def retrieve(comm: Comm, ulysses_size: int, ring_size: int) -> tuple[RetrievalResult, list[list[int]]]:
    network = build_model(ModelConfig(**BASE), masked=False, seed=1)
    kernel = SdpaKernel()
    mesh = build_mesh(comm, ulysses_size=ulysses_size, ring_size=ring_size)
    inner, answers = Continuer(kernel, comm), []

    def continued(network, prompts, new_tokens):
        answers.extend(inner(network, prompts, new_tokens))
        return answers[-len(prompts) :]

    trials = choose_trials(Lists([150, 40, 120, 99]), GRID, 3)
    return run_retrieval(network, Scorer(kernel, mesh), continued, trials, GRID), answers


@pytest.mark.parametrize(("ulysses_size", "ring_size"), [(2, 2), (1, 4)])
def test_every_point_is_that_of_one_process(ulysses_size: int, ring_size: int):
    alone, answers = retrieve(SoloComm(), 1, 1)
    assert len(answers) == 4 * 6 * 3
    assert len({tuple(answer) for answer in answers}) > 10
    for result, given in run_in_process(4, lambda comm: retrieve(comm, ulysses_size, ring_size)):
        assert given == answers
        for point, expected in zip(result.points, alone.points, strict=True):
            assert (point.method, point.length, point.depth) == (
                expected.method,
                expected.length,
                expected.depth,
            )
            assert (point.recalled, point.trials) == (expected.recalled, expected.trials)
            found, known = (torch.tensor([p.gain.mean, p.gain.low, p.gain.high]) for p in (point, expected))
            torch.testing.assert_close(found, known, rtol=2e-6, atol=1e-5)

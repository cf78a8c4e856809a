"""Retrieval by depth: what is asked, what counts as found, and that a network which can copy is seen to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_extrapolation import KERNEL, METHODS, SCORE, TRAINED, VOCAB, Lists

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.config.model import ModelConfig
from roformer_dist.engine.scoring import Continuer
from roformer_dist.extrapolation.retrieval import (
    ANSWER,
    CUE,
    DEPTHS,
    SHORTEST,
    choose_trials,
    retrieval_findings,
    retrieval_tokens,
    run_retrieval,
    trials_within,
)
from roformer_dist.extrapolation.sweep import Grid
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.parallel.comm import SoloComm

GRID = Grid(TRAINED, (SHORTEST, 2 * SHORTEST), ("none", "yarn"))
CONTINUE = Continuer(KERNEL, SoloComm())


def network() -> RoFormer:
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, init_std=0.3
    )
    return build_model(model, masked=False, seed=1)


def documents() -> Lists:
    return Lists([400, 20, 300, 250])


class Copier:
    """Finds the last CUE tokens earlier in its context, at most ``reach`` tokens back, and repeats what followed."""

    def __init__(self, reach: int) -> None:
        self.reach, self.prompts = reach, []

    def __call__(self, network, prompts, new_tokens):
        self.prompts += prompts
        return [self._answer(prompt.tolist(), new_tokens) for prompt in prompts]

    def _answer(self, tokens: list[int], count: int) -> list[int]:
        cue = tokens[-CUE:]
        for start in range(len(tokens) - CUE - 1, -1, -1):
            if tokens[start : start + CUE] == cue and len(tokens) - start <= self.reach:
                return tokens[start + CUE : start + CUE + count]
        return [-1] * count

    def score(self, network, batch: Batch) -> torch.Tensor:
        """0.5 nats a token where the answer can be copied, otherwise 3."""
        losses = []
        for ids, labels in zip(batch.input_ids, batch.labels):
            counted = labels != IGNORE_INDEX
            prompt = ids[: len(ids) - ANSWER + 1].tolist()
            known = self._answer(prompt, ANSWER) == labels[counted].tolist()
            losses.append(torch.full((int(counted.sum()),), 0.5 if known else 3.0, dtype=torch.float64))
        return torch.cat(losses)


def test_a_network_that_copies_finds_all_and_one_that_forgets_only_what_is_near():
    for reach in (10**6, 40):
        copier = Copier(reach)
        result = run_retrieval(network(), copier.score, copier, choose_trials(documents(), GRID, 3), GRID)
        assert result.trials == 3
        for method in GRID.methods:
            for length in GRID.lengths:
                assert result.at(method, length, None).recalled == 0
                for depth in DEPTHS:
                    point = result.at(method, length, depth)
                    found = point.distance <= reach
                    assert (point.recalled, point.trials) == (3 * found, 3)
                    assert point.gain.mean == pytest.approx(2.5 * found)


def test_prompts_have_the_length_the_passage_the_depth_and_the_cue():
    copier, progress = Copier(10**6), []
    run_retrieval(
        *(network(), copier.score, copier, choose_trials(documents(), GRID, 3), GRID),
        progress=lambda done, total, what: progress.append((done, total)),
    )
    assert (
        progress[-1][0] == progress[-1][1] == retrieval_tokens(GRID, 3) == 2 * sum(GRID.lengths) * 2 * 6 * 3
    )
    # One evaluation a length and method, each without a passage and at every depth.
    assert len(copier.prompts) == 2 * 2 * (1 + len(DEPTHS)) * 3
    for at, length in ((0, GRID.lengths[0]), (2 * 3 * (1 + len(DEPTHS)), GRID.lengths[1])):
        part = copier.prompts[at : at + 3 * (1 + len(DEPTHS))]
        without, *deep = (part[i : i + 3] for i in range(0, len(part), 3))
        for trial in range(3):
            plain = without[trial].tolist()
            assert len(plain) == length - ANSWER + 1
            cue, text = plain[-CUE:], plain[:-CUE]
            for depth, prompts in zip(DEPTHS, deep):
                prompt = prompts[trial].tolist()
                assert len(prompt) == len(plain)
                starts = [i for i in range(len(prompt)) if prompt[i : i + CUE] == cue]
                place = round(depth * (len(text) - CUE - ANSWER))
                assert starts == [place, len(prompt) - CUE]
                # What is left without the passage is the end of the text.
                rest = prompt[:place] + prompt[place + CUE + ANSWER : -CUE]
                assert rest == text[CUE + ANSWER :]


def test_losses_and_answers_are_those_of_the_network():
    model, asked = network(), []

    def score(network, batch):
        asked.append(batch)
        return SCORE(network, batch)

    result = run_retrieval(model, score, CONTINUE, choose_trials(documents(), GRID, 2), GRID)
    # All depths of one length and method are asked together, first without a passage, then at depth 0.
    with torch.no_grad():
        guessed, nll = SCORE(model, asked[0]).reshape(-1, 2, ANSWER).mean(2)[:2]
    first = result.at("none", GRID.lengths[0], DEPTHS[0])
    assert first.gain.mean == pytest.approx(float((guessed - nll).mean()), abs=1e-9)
    # Without a passage nothing is gained, and the shortest length is beyond the trained one: methods differ.
    assert result.at("none", GRID.lengths[0], None).gain.mean == 0
    assert first.gain.mean != result.at("yarn", GRID.lengths[0], DEPTHS[0]).gain.mean
    assert all(math.isfinite(point.gain.mean) for point in result.points)


def test_within_the_trained_length_all_methods_are_one_evaluation():
    copier = Copier(10**6)
    grid = Grid(2 * SHORTEST, (SHORTEST, 2 * SHORTEST), tuple(METHODS))
    result = run_retrieval(network(), copier.score, copier, choose_trials(documents(), grid, 1), grid)
    assert len(copier.prompts) == 2 * (1 + len(DEPTHS))
    points = [result.at(method, SHORTEST, 0.5) for method in METHODS]
    assert len({replace(point, method="") for point in points}) == 1
    assert retrieval_findings(result) == []


def test_findings_speak_of_what_is_farther_back_than_the_trained_length():
    copier = Copier(40)
    result = run_retrieval(network(), copier.score, copier, choose_trials(documents(), GRID, 3), GRID)
    near = sum(TRAINED < result.at("none", GRID.lengths[1], d).distance <= 40 for d in DEPTHS)
    far = sum(result.at("none", GRID.lengths[1], d).distance > TRAINED for d in DEPTHS)
    assert f"RoPE, unscaled repeats {3 * near} of {3 * far} passages" in retrieval_findings(result)[0]


def test_the_cue_is_nowhere_else_and_no_document_end_is_asked_for():
    class Repeating(Lists):
        """Documents 0 and 1 are the same text, whose passages would be found in it."""

        def __init__(self) -> None:
            super().__init__([98, 98, 60])  # all of it is in the window
            self._tokens[1] = self._tokens[0]
            for tokens in self._tokens:
                tokens[-1] = VOCAB - 1
                tokens[:-1] %= VOCAB - 1

    copier = Copier(10**6)
    result = run_retrieval(network(), copier.score, copier, choose_trials(Repeating(), GRID, 4), GRID)
    assert all(result.at(m, n, None).recalled == 0 for m in GRID.methods for n in GRID.lengths)
    answers = [copier._answer(prompt.tolist(), ANSWER) for prompt in copier.prompts]
    assert not any(VOCAB - 1 in answer for answer in answers)
    # Of a document of one token more than a passage, all but its end.
    short = Lists([900, CUE + ANSWER + 1])
    passages = choose_trials(short, GRID, 8).passages
    assert [passage.tolist() for passage in passages] == [short.read(1)[:-1].tolist()] * 8


def test_nobody_asked_and_it_is_left_out_with_the_reason_where_it_is_long_or_does_not_fit():
    budget = retrieval_tokens(GRID, 2) // 4
    trials, why = trials_within(documents, GRID, token_budget=budget, asked=None)
    assert trials
    assert (len(trials.passages), why) == (2, "")
    trials, why = trials_within(documents, GRID, token_budget=budget - 1, asked=None)
    assert trials is None
    assert "--retrieval-trials 2 measures it" in why
    trials, why = trials_within(lambda: Lists([400]), GRID, token_budget=10**9, asked=None)
    assert trials is None
    assert "hold out more documents" in why
    # What was asked for is done, or an error.
    trials, why = trials_within(documents, GRID, token_budget=1, asked=3)
    assert trials
    assert (len(trials.passages), why) == (3, "")
    assert trials_within(documents, GRID, token_budget=1, asked=0) == (None, "")
    with pytest.raises(ValueError, match="hold out more documents"):
        trials_within(lambda: Lists([400]), GRID, token_budget=10**9, asked=1)


@pytest.mark.parametrize(
    ("grid", "lengths", "trials", "message"),
    [
        (replace(GRID, lengths=(SHORTEST - 1,)), [400, 300], 2, f"needs {SHORTEST} tokens"),
        (GRID, [400, 300], 0, "--retrieval-trials 0"),
        (GRID, [400], 2, "no held-out document besides number 0"),
        (GRID, [400, CUE + ANSWER], 2, "no held-out document besides number 0"),
    ],
)
def test_what_does_not_fit_is_one_line(grid, lengths, trials, message):
    with pytest.raises(ValueError, match=message):
        choose_trials(Lists(lengths), grid, trials)

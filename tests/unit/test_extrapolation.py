"""The sweep and the gain of context on a tiny random network, against loops over single targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.data import ClassificationObjective
from roformer_dist.config.layers import LearnedPosition
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig, YarnScaling
from roformer_dist.engine.scoring import Scorer
from roformer_dist.extrapolation.context import context_gain
from roformer_dist.extrapolation.intervals import clustered_mean, student_t_975
from roformer_dist.extrapolation.perplexity import choose_windows, sliding_ends, window_nll
from roformer_dist.extrapolation.sweep import Grid, position_edges, run_sweep
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.model.rotary import Rotary
from roformer_dist.parallel.comm import SoloComm
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import single_sequence_ops

VOCAB, TRAINED = 37, 16
KERNEL = choose_kernel("sdpa", "cpu")[0]
OPS = single_sequence_ops(KERNEL)
SCORE = Scorer(KERNEL, build_mesh(SoloComm(), ulysses_size=1))
METHODS = ["none", "linear", "ntk", "yarn"]


class Lists:
    """Documents in memory; notes which were read."""

    def __init__(self, lengths: list[int]) -> None:
        generator = np.random.default_rng(5)
        self.lengths = np.array(lengths)
        self._tokens = [generator.integers(0, VOCAB, length) for length in lengths]

    def read(self, document: int) -> np.ndarray:
        return self._tokens[document]


@pytest.fixture
def network() -> RoFormer:
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, init_std=0.3
    )
    return build_model(model, masked=False, seed=1)


def one_loss(network: RoFormer, context: np.ndarray, target: int) -> float:
    """Loss of one target after ``context``, by a forward of its own and a plain log-softmax."""
    inputs = torch.as_tensor(context)[None]
    positions = torch.arange(len(context))[None]
    mask = MaskSpec.from_lengths([len(context)], causal=True)
    with torch.no_grad():
        features = network(Batch(inputs, inputs, positions, positions, mask), OPS)[0, -1]
        return float(-torch.log_softmax(features @ network.head.weight.T, dim=0)[target])


def sweep(network: RoFormer, documents: Lists, **changes):
    arguments = {"trained_seq_len": TRAINED, "lengths": [8, 16, 32, 40], "methods": METHODS}
    return run_sweep(network, SCORE, documents, **(arguments | {"token_budget": 4000} | changes))


def test_every_length_scores_the_same_targets_as_a_plain_loop(network: RoFormer) -> None:
    documents = Lists([90, 20, 70])
    result = sweep(network, documents, methods=["none"])
    windows = choose_windows(documents, longest=40, scored=8, count=result.windows)
    for length in (8, 16, 32, 40):
        by_hand = [
            one_loss(network, window[40 - length : end], int(window[end]))
            for window in windows.tokens.numpy()
            for end in range(33, 41)
        ]
        assert result.at("none", length).nll.n == len(by_hand) == result.targets
        assert result.at("none", length).nll.mean == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert result.too_short == 1
    assert result.documents == 2


def test_scaled_methods_use_their_own_frequencies(network: RoFormer) -> None:
    documents = Lists([90])
    result = sweep(network, documents, methods=["none", "yarn"], lengths=[32])
    window = choose_windows(documents, longest=32, scored=8, count=result.windows).tokens.numpy()
    before = network.rotary
    yarn = YarnScaling(kind="yarn", factor=2.0, original_seq_len=TRAINED)
    network.rotary = Rotary(RopeConfig(scaling=yarn), 16)
    by_hand = np.mean([one_loss(network, w[:end], int(w[end])) for w in window for end in range(25, 33)])
    network.rotary = before
    assert result.at("yarn", 32).nll.mean == pytest.approx(by_hand, abs=1e-5)
    assert abs(result.at("yarn", 32).minus_cropped.mean) > 1e-4


def test_within_the_trained_length_all_methods_are_one(network: RoFormer) -> None:
    result = sweep(network, Lists([90, 70]))
    for length in (8, 16):
        losses = {result.at(method, length).nll.mean for method in METHODS}
        assert len(losses) == 1
    assert result.at("none", 16).nll == result.at("cropped", 16).nll
    assert result.at("none", 16).minus_cropped.mean == 0
    assert result.at("none", 8).minus_cropped.mean != 0
    assert len({result.at(method, 40).nll.mean for method in METHODS}) == 4
    assert {result.at("cropped", length).nll.mean for length in result.lengths} == {
        result.at("none", 16).nll.mean
    }
    assert result.best(16) is None
    assert result.best(40) is not None


# 37 is not a whole number of strides above the trained length.
@pytest.mark.parametrize("longest", [40, 37])
def test_by_position_cropped_and_unscaled_agree_until_the_trained_length(
    network: RoFormer, longest: int
) -> None:
    result = sweep(network, Lists([90, 70]), lengths=[longest])
    points = {(p.method, p.last): p for p in result.by_position}
    lasts = sorted(last for method, last in points if method == "none")
    assert TRAINED in lasts
    assert lasts[-1] == longest
    for last in lasts:
        gap = abs(points["none", last].minus_cropped.mean)
        assert gap < 1e-5 if last <= TRAINED else gap > 1e-4
    scored = sum(p.nll.n for p in result.by_position if p.method == "none")
    assert scored == longest * result.windows
    assert {p.nll.clusters for p in (*result.by_length, *result.by_position)} == {2}
    assert len({(p.nll.low, p.nll.high) for p in result.by_position}) > len(lasts)


def test_cropped_targets_see_at_most_the_trained_length(network: RoFormer) -> None:
    documents = Lists([45])
    result = sweep(network, documents, methods=["none"], lengths=[40])
    tokens = choose_windows(documents, longest=40, scored=8, count=1).tokens[0].numpy()
    by_hand = []
    for target in range(1, 41):
        # Strides of 8 from the end: targets 33..40 from tokens 24.., 25..32 from 16.., 17..24 from 8..
        start = 0 if target <= 16 else 8 * ((target - 1) // 8) - 8
        by_hand.append(one_loss(network, tokens[start:target], int(tokens[target])))
    total = sum(p.nll.mean * p.nll.n for p in result.by_position if p.method == "cropped")
    assert total == pytest.approx(sum(by_hand), abs=1e-3)


def test_sliding_windows_cover_every_target_once() -> None:
    assert sliding_ends(40, 16, 8) == [16, 40, 32, 24]
    assert sliding_ends(16, 16, 8) == [16]
    assert sliding_ends(21, 16, 8) == [16, 21]
    assert position_edges(512, 2048) == [0, 16, 32, 64, 128, 256, 512, 724, 1024, 1448, 2048]
    assert position_edges(512, 700) == [0, 16, 32, 64, 128, 256, 512, 700]
    assert position_edges(16, 16) == [0, 16]
    assert position_edges(2, 3) == [0, 2, 3]


def test_tokens_fed_and_progress_agree_with_the_plan(network: RoFormer) -> None:
    seen: list[tuple[int, int, str]] = []
    network.train()
    original = network.rotary
    result = sweep(network, Lists([90, 70]), progress=lambda *state: seen.append(state))
    # cropped 4 x 16; 8 once, 16 shared, 32 and 40 with four methods each.
    assert Grid(16, (8, 16, 32, 40), tuple(METHODS)).tokens_per_window == 64 + 8 + 4 * (32 + 40)
    assert result.tokens == seen[-1][0] == seen[-1][1] == 360 * result.windows
    assert network.training
    assert network.rotary is original


def test_windows_are_spread_and_their_targets_disjoint() -> None:
    documents = Lists([41, 200, 500, 40])
    windows = choose_windows(documents, longest=40, scored=8, count=9)
    counts = np.bincount(windows.document, minlength=4).tolist()
    assert counts == [1, 4, 4, 0]
    everything = choose_windows(documents, longest=40, scored=8, count=10**6)
    for document in (1, 2):
        tokens = documents.read(document)
        views = np.lib.stride_tricks.sliding_window_view(tokens, 41)
        own = everything.tokens.numpy()[everything.document == document]
        ends = [int((views == window).all(1).argmax()) + 40 for window in own]
        assert min(np.diff(ends)) >= 8
        assert max(ends) > len(tokens) - 10
        assert min(ends) < 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["none", "rope++"]}, r"unknown method 'rope\+\+'; known: none, linear, ntk, yarn"),
        ({"methods": []}, "at least one length and one method"),
        ({"lengths": []}, "at least one length and one method"),
        ({"lengths": [4, 32]}, "length 4 is below 8"),
        ({"lengths": [8]}, "the longest length, 8, is below the trained length, 16"),
        ({"lengths": [16, 95]}, "the longest is document 1 with 90; drop the lengths above 89"),
        ({"trained_seq_len": 1}, "trained_seq_len = 1"),
    ],
)
def test_errors_are_one_line_with_the_fix(network: RoFormer, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sweep(network, Lists([70, 90]), **changes)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_swept_are_refused(network: RoFormer) -> None:
    with pytest.raises(ValueError, match="masked language model"):
        sweep(build_model(network.config, masked=True, seed=0), Lists([90]))
    classes = ClassificationObjective(kind="classification", num_labels=2)
    with pytest.raises(ValueError, match="classification model"):
        sweep(build_model(network.config, masked=False, seed=0, classes=classes), Lists([90]))
    yarn = YarnScaling(kind="yarn", factor=2.0, original_seq_len=TRAINED)
    scaled = network.config.model_copy(update={"rope": RopeConfig(scaling=yarn)})
    with pytest.raises(ValueError, match="'yarn' already"):
        sweep(build_model(scaled, masked=False, seed=0), Lists([90]))
    learned = network.config.model_copy(update={"position": LearnedPosition(kind="learned", max_seq_len=24)})
    positions = build_model(learned, masked=False, seed=0)
    with pytest.raises(ValueError, match=r"changes rotary frequencies, and model.position.kind is 'learned'"):
        sweep(positions, Lists([90]))
    with pytest.raises(ValueError, match=r"beyond the 24 positions that have learned vectors"):
        sweep(positions, Lists([90]), methods=["none"])
    with torch.no_grad():
        network.embedding.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        sweep(network, Lists([90]))


def test_a_causal_head_with_a_transform_is_no_masked_model(network: RoFormer) -> None:
    transformed = network.config.model_copy(update={"head_transform": True, "bias": True})
    result = sweep(build_model(transformed, masked=False, seed=0), Lists([90]), lengths=[32])
    assert np.isfinite(result.at("yarn", 32).nll.mean)


def packed_batch(*rows: list[int]) -> Batch:
    """Rows of pieces of the given lengths, the last token of each piece without a target."""
    generator = torch.Generator().manual_seed(3)
    size = sum(rows[0])
    tokens = torch.randint(0, VOCAB, (len(rows), size), generator=generator)
    labels = tokens.roll(-1, dims=1)
    for row, lengths in enumerate(rows):
        labels[row, np.cumsum(lengths) - 1] = IGNORE_INDEX
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    mask = MaskSpec.from_lengths([n for lengths in rows for n in lengths], causal=True)
    return Batch(tokens, labels, positions, positions, mask)


def test_context_gain_equals_one_forward_a_target(network: RoFormer) -> None:
    batches = [packed_batch([30, 10], [5, 35]), packed_batch([40])]
    measured = context_gain(network, SCORE, batches)
    full, short, previous, targets, pieces = [], [], [], [], []
    for number, batch in enumerate(batches):
        for row in range(len(batch.input_ids)):
            ids = batch.input_ids[row].numpy()
            for t in range(ids.size):
                target, start = int(batch.labels[row, t]), t - int(batch.position_ids[row, t])
                if target != IGNORE_INDEX:
                    full.append(one_loss(network, ids[start : t + 1], target))
                    short.append(one_loss(network, ids[max(start, t - 7) : t + 1], target))
                    previous.append(ids[t])
                    targets.append(target)
                    pieces.append((number, row, start))
    assert measured.validation_loss == pytest.approx(np.mean(full), abs=1e-5)
    assert measured.short_context_loss == pytest.approx(np.mean(short), abs=1e-5)
    assert abs(np.mean(full) - np.mean(short)) > 1e-4
    assert measured.previous.tolist() == previous
    assert measured.targets.tolist() == targets
    labels = np.unique([str(piece) for piece in pieces], return_inverse=True)[1]
    expected = clustered_mean(np.array(short) - np.array(full), labels)
    assert measured.gain.clusters == expected.clusters == 5
    assert (measured.gain.low, measured.gain.high) == pytest.approx((expected.low, expected.high), abs=1e-5)
    # Pieces 1 and 2 of the first batch are one document, so there is one cluster less.
    joined = context_gain(network, SCORE, batches, documents=[7, 8, 8, 9, 3]).gain
    expected = clustered_mean(np.array(short) - np.array(full), np.array([7, 8, 8, 9, 3])[labels])
    assert joined.clusters == expected.clusters == 4
    assert (joined.low, joined.high) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_context_gain_of_short_pieces_is_zero_and_of_nothing_an_error(network: RoFormer) -> None:
    assert context_gain(network, SCORE, [packed_batch([8, 8], [5, 11])], short_context=11).gain.mean == 0
    empty = packed_batch([8])
    empty.labels.fill_(IGNORE_INDEX)
    with pytest.raises(ValueError, match="no target counts"):
        context_gain(network, SCORE, [empty])
    both_sides = Batch(
        *(getattr(empty, n) for n in ("input_ids", "labels", "position_ids", "counters")),
        MaskSpec.from_lengths([8], causal=False),
    )
    with pytest.raises(ValueError, match="causal"):
        context_gain(network, SCORE, [both_sides])


def test_clustered_interval_of_a_worked_example() -> None:
    # Mean 18 / 6 = 3; residual sums -2, 2, 0; error sqrt(3/2 * 8) / 6 = 0.57735; t(2) = 4.303.
    estimate = clustered_mean(np.array([1.0, 3, 5, 2, 2, 5]), np.array([7, 7, 1, 9, 9, 9]))
    assert (estimate.mean, estimate.n, estimate.clusters) == (3.0, 6, 3)
    assert estimate.high - 3 == pytest.approx(4.303 * math.sqrt(12) / 6)
    assert 3 - estimate.low == pytest.approx(estimate.high - 3)
    assert math.isnan(clustered_mean(np.ones(3), np.zeros(3)).low)
    with pytest.raises(ValueError, match="no targets"):
        clustered_mean(np.empty(0), np.empty(0))


@pytest.mark.parametrize(
    ("freedom", "exact"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042)]
)
def test_student_quantiles(freedom: int, exact: float) -> None:
    assert student_t_975(freedom) == pytest.approx(exact, abs=0.03)


def test_rows_of_a_forward_do_not_change_the_losses(network: RoFormer, monkeypatch) -> None:
    tokens = torch.randint(0, VOCAB, (5, 21), generator=torch.Generator().manual_seed(0))
    call = lambda: window_nll(  # noqa: E731
        network, SCORE, tokens, length=20, scored=4, advance=lambda tokens: None
    )
    with torch.inference_mode():
        together = call()
        monkeypatch.setattr("roformer_dist.extrapolation.perplexity.FORWARD_TOKENS", 40)
        np.testing.assert_allclose(call(), together, atol=1e-5)

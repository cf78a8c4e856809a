"""Dropout drawn from counters: the same for a token wherever it is computed, random otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from roformer_dist.config import ModelConfig
from roformer_dist.config.data import ClassificationObjective
from roformer_dist.model.dropout import CounterDropout, mix64
from roformer_dist.model.heads import ClassificationHead

ROWS, SEQ, WIDTH = 4, 32, 24
COUNTERS = torch.arange(ROWS * SEQ).reshape(ROWS, SEQ) + 1000


def kept(
    counters: Tensor = COUNTERS, *, p: float = 0.3, seed: int = 7, site: int = 3, width: int = WIDTH
) -> Tensor:
    """Which channels of each token survive."""
    dropout = CounterDropout(p, seed=seed, site=site)
    return dropout(torch.ones(*counters.shape, width), counters, training=True) != 0


def python_splitmix_finaliser(x: int) -> int:
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    values = [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64, 123456789123456789]
    found = [x % 2**64 for x in mix64(torch.tensor(values)).tolist()]
    assert found == [python_splitmix_finaliser(x) for x in values]
    # The first number of the published generator at seed 0.
    assert found[5] == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("sp_size", [2, 4])
def test_a_rank_slice_draws_what_the_whole_row_draws(sp_size: int) -> None:
    whole = kept()
    slices = [kept(part) for part in COUNTERS.chunk(sp_size, dim=1)]
    assert torch.equal(torch.cat(slices, dim=1), whole)


def test_the_order_and_number_of_rows_do_not_matter() -> None:
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(kept(COUNTERS[order]), kept()[order])
    assert torch.equal(kept(COUNTERS[1:2]), kept()[1:2])


def test_the_global_generator_does_not_matter() -> None:
    first = kept()
    torch.manual_seed(99)
    assert torch.equal(kept(), first)


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of equal decisions; p^2 + (1 - p)^2 = 0.58 for independent draws at p = 0.3."""
    return (a == b).double().mean().item()


@pytest.mark.parametrize(
    "other",
    [kept(site=4), kept(seed=8), kept(COUNTERS + 1), kept(COUNTERS + ROWS * SEQ), kept(seed=4, site=6)],
    ids=["site", "seed", "next token", "next step", "seed and site"],
)
def test_other_sites_seeds_and_tokens_draw_independently(other: Tensor) -> None:
    draws = ROWS * SEQ * WIDTH
    assert abs(agreement(kept(), other) - 0.58) <= 5 * math.sqrt(0.58 * 0.42 / draws)


def test_tokens_and_channels_of_one_call_draw_independently() -> None:
    mask = kept()
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[..., 1:], mask[..., :-1]), (mask[1:], mask[:-1])):
        assert abs(agreement(a, b) - 0.58) <= 5 * math.sqrt(0.58 * 0.42 / a.numel())


def test_no_two_sites_or_seeds_share_a_key() -> None:
    keys = {CounterDropout(0.1, seed=seed, site=site).key for seed in range(40) for site in range(40)}
    assert len(keys) == 1600


def test_a_network_laid_out_without_memory_has_the_same_keys() -> None:
    with torch.device("meta"):
        key = CounterDropout(0.1, seed=7, site=3).key
    assert key == CounterDropout(0.1, seed=7, site=3).key


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_channels_is_binomial(p: float) -> None:
    counters = torch.arange(2000)[None] * 3 + 2**40
    mask = kept(counters, p=p, width=100)
    assert abs((~mask).sum().item() - p * mask.numel()) <= 5 * math.sqrt(p * (1 - p) * mask.numel())
    # Also for each channel over the tokens: none is dropped more often than the others.
    per_channel = (~mask).sum((0, 1)).double()
    assert (per_channel - p * 2000).abs().max() <= 5 * math.sqrt(p * (1 - p) * 2000)


def test_the_expectation_is_preserved() -> None:
    x = torch.rand(1, 2000, 50) + 0.5
    y = CounterDropout(0.25, seed=1, site=0)(x, torch.arange(2000)[None], training=True)
    # Survivors are scaled by exactly 1 / (1 - p).
    assert torch.equal(y[y != 0], (x / 0.75)[y != 0])
    deviation = (x.double() ** 2).sum().sqrt() * math.sqrt(0.25 / 0.75)
    assert abs(y.double().sum() - x.double().sum()) <= 5 * deviation


def test_the_gradient_has_the_mask_of_the_forward() -> None:
    x = torch.ones(ROWS, SEQ, WIDTH, requires_grad=True)
    y = CounterDropout(0.3, seed=7, site=3)(x, COUNTERS, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(("p", "training"), [(0.3, False), (0.0, True)])
def test_nothing_is_dropped_in_evaluation_or_with_probability_0(p: float, training: bool) -> None:
    x = torch.randn(ROWS, SEQ, WIDTH)
    assert torch.equal(CounterDropout(p, seed=7, site=3)(x, COUNTERS, training=training), x)


def test_bf16_has_the_mask_of_fp32() -> None:
    x = torch.ones(ROWS, SEQ, WIDTH, dtype=torch.bfloat16)
    y = CounterDropout(0.3, seed=7, site=3)(x, COUNTERS, training=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y != 0, kept())


def test_a_classifier_drops_before_each_of_its_layers_and_draws_by_row() -> None:
    model = ModelConfig(
        vocab_size=8, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=8, hidden_dropout=0.5
    )
    classes = ClassificationObjective(kind="classification", num_labels=3)
    head = ClassificationHead(model, classes, seed=7)
    pooled, rows = torch.randn(5, 32), torch.arange(5) + 40
    outcome = head(pooled, rows)
    assert not torch.equal(head(pooled, rows + 1), outcome)
    assert torch.equal(head(pooled.flip(0), rows.flip(0)).flip(0), outcome)
    # A block has the sites up to 2 * num_layers, the embedding the first.
    assert [site.key for site in head.dropouts] == [CounterDropout(0.5, seed=7, site=i).key for i in (3, 4)]
    for site in head.dropouts:
        site.probability = 0.0
        assert not torch.equal(head(pooled, rows), outcome)
        site.probability = 0.5
    with pytest.raises(ValueError, match="needs the batch's row_ids"):
        head(pooled, None)
    assert torch.equal(head.eval()(pooled, None), head(pooled, rows + 1))

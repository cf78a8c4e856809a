"""The order of rows: a permutation of each epoch, local to a window, and what docs/data_delivery.md says."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roformer_dist.data.order import RowOrder, permuted

groups = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def offsets(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def order(sizes: list[int], window: int = 4, seed: int = 1, source: int = 0) -> RowOrder:
    return RowOrder(offsets(sizes), window, seed=seed, source=source)


@given(
    sizes=groups,
    window=st.integers(1, 14),
    seed=st.integers(0, 2**63 - 1),
    source=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_row_once(
    sizes: list[int], window: int, seed: int, source: int, epoch: int
) -> None:
    count = sum(sizes)
    rows = order(sizes, window, seed, source).rows(np.arange(count) + epoch * count)
    assert np.array_equal(np.sort(rows), np.arange(count))


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=60)
def test_a_key_names_a_permutation(size: int, key: int) -> None:
    moved = permuted(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(moved), np.arange(size))


@given(sizes=groups, window=st.integers(1, 14), epoch=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_rows_come_from_one_window_of_shard_groups_at_a_time(
    sizes: list[int], window: int, epoch: int
) -> None:
    count = sum(sizes)
    rows = order(sizes, window).rows(np.arange(count) + epoch * count)
    group = np.searchsorted(offsets(sizes), rows, side="right") - 1
    position = {number: np.flatnonzero(group == number) for number in set(group.tolist())}
    # No more than `window` groups are open (begun and not finished) at any place.
    opened = np.zeros(count + 1, dtype=int)
    for places in position.values():
        opened[places[0]] += 1
        opened[places[-1] + 1] -= 1
    assert np.cumsum(opened).max() <= window


def test_epochs_seeds_and_sources_differ_and_mix() -> None:
    n = 1000
    sizes = [100] * 10
    first = order(sizes, 10).rows(np.arange(n))
    second = order(sizes, 10).rows(np.arange(n, 2 * n))
    others = [order(sizes, 10, seed=2).rows(np.arange(n)), order(sizes, 10, source=7).rows(np.arange(n))]
    for a, b in ((first, second), *((first, other) for other in others), (first, np.arange(n))):
        assert (a == b).mean() < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    # Several epochs at once, in any order and shape, are the same as one by one.
    numbers = np.arange(2 * n)[::-5].reshape(4, 100)
    assert np.array_equal(order(sizes, 10).rows(numbers), np.concatenate([first, second])[numbers])


def test_every_place_is_as_likely_for_a_row() -> None:
    keys = np.arange(20_000).astype(np.uint64)
    size = 7
    moved = permuted(np.full(len(keys), 3), np.full(len(keys), size), keys)
    counts = np.bincount(moved, minlength=size)
    expected = len(keys) / size
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-squared, 6 degrees, p = 0.001


def test_a_step_of_a_hundred_million_rows_costs_what_the_step_needs() -> None:
    sizes = np.full(2_000, 50_000)
    tracemalloc.start()
    started = time.process_time()
    numbers = np.arange(512) + 12_345_678_901  # in epoch 123
    rows = order(sizes.tolist(), window=8).rows(numbers)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 512
    assert rows.max() < 10**8
    assert peak < 4 * 2**20  # eight bytes for each row of the epoch would be 800 MB
    assert seconds < 2


# The page, written again with plain integers.


def page_hash(*parts: int) -> int:
    def mix(v: int) -> int:
        v %= 2**64
        v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        v = (v ^ v >> 27) * 0x94D049BB133111EB % 2**64
        return v ^ v >> 31

    state = 0
    for part in parts:
        state = mix((state + 0x9E3779B97F4A7C15) % 2**64 ^ mix(part + 0x9E3779B97F4A7C15))
    return state


def page_permute(index: int, size: int, *key: int) -> int:
    height = math.ceil(math.sqrt(size))
    width = math.ceil(size / height)
    while True:
        y, x = divmod(index, width)
        for n in range(6):
            if n % 2 == 0:
                y = (y + page_hash(*key, n, x)) % height
            else:
                x = (x + page_hash(*key, n, y)) % width
        index = y * width + x
        if index < size:
            return index


def page_row(number: int, sizes: list[int], window: int, seed: int, source: int) -> int:
    epoch, index = divmod(number, sum(sizes))
    sequence = [page_permute(p, len(sizes), seed, source, epoch, 0) for p in range(len(sizes))]
    for w in range(0, len(sizes), window):
        members = sequence[w : w + window]
        here = sum(sizes[g] for g in members)
        if index < here:
            place = page_permute(index, here, seed, source, epoch, w // window + 1)
            for group in members:
                if place < sizes[group]:
                    return sum(sizes[:group]) + place
                place -= sizes[group]
        index -= here
    raise AssertionError


@pytest.mark.parametrize(
    ("sizes", "window"), [([1], 1), ([2], 4), ([3, 0, 4, 1], 2), ([17, 5, 0, 30, 2], 3), ([291], 1)]
)
def test_the_order_is_what_the_page_says(sizes: list[int], window: int) -> None:
    numbers = range(3 * sum(sizes))
    found = order(sizes, window, seed=7, source=12345678901234567890).rows(np.array(numbers))
    assert found.tolist() == [page_row(n, sizes, window, 7, 12345678901234567890) for n in numbers]

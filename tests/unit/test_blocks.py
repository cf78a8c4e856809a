"""The tiling of a document's visible region, by brute force over small sizes."""

from __future__ import annotations

from itertools import product

import pytest

from roformer_dist.kernels.blocks import Block, visible_blocks


def visible_pairs(
    q_len: int, k_len: int, offset: int, causal: bool, window: int | None, min_distance: int | None = None
) -> list[tuple[int, int]]:
    """By the definition: query t stands ``t + offset`` in the keys' counting."""
    pairs = []
    for t, s in product(range(q_len), range(k_len)):
        distance = t + offset - s
        if (causal and distance < 0) or (window is not None and abs(distance) >= window):
            continue
        if min_distance is not None and distance < min_distance:
            continue
        pairs.append((t, s))
    return pairs


def pairs_of(block: Block) -> list[tuple[int, int]]:
    """By the definition of the three shapes, counted from the block's corner."""
    sees = {"full": lambda t, s: True, "lower": lambda t, s: s <= t, "upper": lambda t, s: s >= t}[
        block.shape
    ]
    return [
        (t, s)
        for t, s in product(range(block.q_start, block.q_stop), range(block.k_start, block.k_stop))
        if sees(t - block.q_start, s - block.k_start)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("min_distance", [None, 0, 1, 3, 4])
def test_blocks_tile_exactly_the_visible_pairs_each_once(
    causal: bool, window: int | None, min_distance: int | None
) -> None:
    for q_len, k_len, offset in product(range(7), range(7), range(-8, 9)):
        visible = {"causal": causal, "window": window, "min_distance": min_distance}
        blocks = visible_blocks(q_len, k_len, offset, **visible)
        found = sorted(pair for block in blocks for pair in pairs_of(block))
        assert found == visible_pairs(q_len, k_len, offset, **visible), (q_len, k_len, offset, blocks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("min_distance", [None, 2])
def test_every_block_suits_a_flash_kernel(causal: bool, window: int | None, min_distance: int | None) -> None:
    # A query of a block that sees none of its keys would come back with lse = 0 instead of -inf, and a
    # triangle read backwards must be a square.
    for q_len, k_len, offset in product(range(7), range(7), range(-8, 9)):
        for block in visible_blocks(
            q_len, k_len, offset, causal=causal, window=window, min_distance=min_distance
        ):
            assert 0 <= block.q_start < block.q_stop <= q_len
            assert 0 <= block.k_start < block.k_stop <= k_len
            assert {t for t, _ in pairs_of(block)} == set(range(block.q_start, block.q_stop))
            if block.shape == "upper":
                assert block.q_stop - block.q_start == block.k_stop - block.k_start


def test_causal_self_attention_is_one_triangle_and_plain_one_rectangle() -> None:
    assert visible_blocks(9, 9, 0, causal=False, window=None) == [Block(0, 9, 0, 9, "full")]
    (triangle,) = visible_blocks(9, 9, 0, causal=True, window=9)[:1]
    assert (triangle.q_start, triangle.k_start) == (0, 0)


def test_a_window_costs_time_in_proportion_to_its_width() -> None:
    # Blocks cover at most about twice the visible pairs, however long the document.
    blocks = visible_blocks(4096, 4096, 0, causal=True, window=64)
    area = sum((b.q_stop - b.q_start) * (b.k_stop - b.k_start) for b in blocks)
    assert area <= 2.1 * 4096 * 64
    assert len(blocks) <= 3 * 4096 / 64 + 1


def test_a_window_of_nothing_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(AssertionError, match="a window of 0 positions"):
        visible_blocks(4, 4, 0, causal=True, window=0)

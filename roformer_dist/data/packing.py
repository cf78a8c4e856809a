"""Packing documents into rows of a fixed length. Only lengths and group keys are read.

Long documents are split over rows, never truncated: every token of the store is in the rows, as often
as the upsampling says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from roformer_dist.data.best_fit import Segments, best_fit
from roformer_dist.data.errors import DataError
from roformer_dist.data.hashing import hash64
from roformer_dist.data.plan import PackOptions, Plan, save_buckets
from roformer_dist.data.store import ShardStore
from roformer_dist.data.units import Units, units_of

METHODS = ("best-fit", "concat", "bucket")
MAX_PADDING = 0.001
MIN_LEN = 256
MAX_SEQ_LEN = 2**31 - 1


def make_plan(store: ShardStore, seq_len: int, **options: Any) -> Plan:
    """The plan of a method that makes one; ``options`` are fields of ``PackOptions``."""
    (plan,) = make_plans(store, seq_len, PackOptions(**options))
    return plan


def make_plans(store: ShardStore, seq_len: int, options: PackOptions) -> list[Plan]:
    """Pack all documents of ``store`` into rows of ``seq_len`` tokens; buckets make several plans.

    ``best-fit`` (see ``roformer_dist.data.best_fit``) cuts few documents; ``concat`` joins them and cuts
    every ``seq_len`` tokens. ``bucket`` puts one piece in a row: a document is cut into powers of two
    from ``seq_len`` down to ``min_len``, longest first, each used as often as it fits (Pouransari et
    al., "Dataset Decomposition", 2024); what remains, below ``min_len``, is padded to ``min_len``.
    Documents are shuffled before packing and rows after it within each shard group, so that the
    first rows of a group are a fair sample of it.

    Raises:
        DataError: the store is empty, or an option is out of range or does nothing with the method.
    """
    options = checked(options, seq_len)
    if len(store) == 0:
        raise DataError(f"{store.path}: holds no documents, so there is nothing to pack")
    units = units_of(store, options)
    order, bounds = units.shuffled(options.seed)
    lengths = units.lengths[order]
    if options.method == "bucket":
        assert options.min_len is not None
        plans, length = [], options.min_len
        while length <= seq_len:
            cut = partial(_bucket, min_len=options.min_len, max_len=seq_len)
            plan = _assemble(store, units, order, bounds, lengths, length, options, cut)
            plans += [plan] if plan.num_rows else []
            length *= 2
        return plans
    if options.method == "concat":
        return [_assemble(store, units, order, bounds, lengths, seq_len, options, _concat)]
    assert options.max_padding is not None
    pack = partial(best_fit, max_padding=options.max_padding)
    return [_assemble(store, units, order, bounds, lengths, seq_len, options, pack)]


def save_plans(plans: Sequence[Plan], path: str | Path) -> None:
    """Write what ``make_plans`` returned: a file, or a new folder for buckets."""
    if plans[0].method == "bucket":
        save_buckets(plans, path)
    else:
        plans[0].save(path)


def checked(options: PackOptions, seq_len: int) -> PackOptions:
    """``options`` with the defaults of its method; DataError for what is out of range or does nothing."""
    method, bucket = options.method, options.method == "bucket"
    if seq_len < 2:
        raise DataError(f"--seq-len {seq_len} leaves no token to predict; give at least 2")
    if seq_len > MAX_SEQ_LEN:
        raise DataError(
            f"--seq-len {seq_len}: attention counts a row's tokens in 32 bits; give at most {MAX_SEQ_LEN}"
        )
    if method not in METHODS:
        raise DataError(f"--method {method}: unknown; use {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    for name, value in (("--shards-per-group", options.shards_per_group), ("--window", options.window)):
        if not 1 <= value < 2**31:
            raise DataError(f"{name} {value}: give at least 1 and at most {2**31 - 1}")
    thresholds = [min_tokens for min_tokens, _ in options.upsample]
    for min_tokens, factor in options.upsample:
        if not 1 <= min_tokens < 2**63 or not 1 <= factor <= 1000 or thresholds.count(min_tokens) > 1:
            raise DataError(
                f"--upsample {min_tokens}:{factor:g}: tokens must be at least 1 and given once, the factor 1 to 1000"
            )
    if method != "best-fit" and options.max_padding is not None:
        raise DataError(f"--max-padding {options.max_padding}: only best-fit has it, not --method {method}")
    if not bucket and (options.min_len, options.max_len) != (None, None):
        raise DataError(f"--min-len {options.min_len}: only buckets have it, not --method {method}")
    if not bucket:
        padding = MAX_PADDING if options.max_padding is None else options.max_padding
        if not 0 <= padding <= 1:
            raise DataError(f"--max-padding {padding}: give a fraction of 0 to 1")
        return replace(options, max_padding=padding if method == "best-fit" else None)
    min_len = min(MIN_LEN, seq_len) if options.min_len is None else options.min_len
    if options.group_by_key or not options.document_mask:
        given = "--group-by-key" if options.group_by_key else "--no-document-mask"
        raise DataError(
            f"{given}: does nothing with --method bucket, whose rows hold one document; leave it out"
        )
    for name, value in (("--seq-len", seq_len), ("--min-len", min_len)):
        if value < 2 or value & (value - 1):
            raise DataError(f"{name} {value}: the rows of buckets are powers of two; give one, at least 2")
    if min_len > seq_len:
        raise DataError(f"--min-len {min_len}: longer than --seq-len {seq_len}; give at most that")
    return replace(options, min_len=min_len, max_len=seq_len)


def _assemble(
    store: ShardStore,
    units: Units,
    order: np.ndarray,
    bounds: np.ndarray,
    lengths: np.ndarray,
    seq_len: int,
    options: PackOptions,
    pack: Callable[[np.ndarray, int], Segments],
) -> Plan:
    """Pack each shard group by itself, shuffle its rows, and turn segments of units into pieces of documents."""
    parts: list[Segments] = []
    group_offsets = np.zeros(units.num_groups + 1, np.int64)
    for group in range(units.num_groups):
        first, last = int(bounds[group]), int(bounds[group + 1])
        row, item, start, length = pack(lengths[first:last], seq_len)
        rows = int(row.max()) + 1 if len(row) else 0
        draws = hash64(options.seed, 1, group, np.arange(rows))
        number = np.empty(rows, np.int64)
        number[np.argsort(draws, kind="stable")] = np.arange(rows) + group_offsets[group]
        row = number[row]
        placed = np.argsort(row, kind="stable")
        parts.append((row[placed], order[first:last][item[placed]], start[placed], length[placed]))
        group_offsets[group + 1] = group_offsets[group] + rows
    row, unit, start, length = (np.concatenate(arrays) for arrays in zip(*parts))
    row, document, start, length = _pieces(units, row, unit, start, length)
    return Plan(
        seq_len=seq_len,
        manifest_root=store.root,
        options=options,
        row_offsets=np.searchsorted(row, np.arange(group_offsets[-1] + 1)).astype(np.int64),
        document=document,
        start=start,
        length=length,
        ends_document=start + length == store.lengths[document],
        group_offsets=group_offsets,
    )


def _pieces(
    units: Units, row: np.ndarray, unit: np.ndarray, start: np.ndarray, length: np.ndarray
) -> Segments:
    """Segments of units, cut where a document of the unit ends: row, document, start, length."""
    if len(units.members) == len(units.copies):
        return row, units.members[unit], start, length
    begin = units.begins[units.offsets[unit]] + start
    end = begin + length
    first = np.searchsorted(units.begins, begin, side="right") - 1
    count = np.searchsorted(units.begins, end, side="left") - first
    segment = np.repeat(np.arange(len(row)), count)
    member = np.arange(len(segment)) - np.repeat(np.cumsum(count) - count, count) + first[segment]
    left = np.maximum(begin[segment], units.begins[member])
    right = np.minimum(end[segment], units.begins[member + 1])
    return row[segment], units.members[member], left - units.begins[member], right - left


def _concat(lengths: np.ndarray, seq_len: int) -> Segments:
    """Cut the joined items at every item's start and at every multiple of ``seq_len``."""
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    begins = np.union1d(firsts[:-1], np.arange(0, firsts[-1], seq_len))
    item = np.searchsorted(firsts, begins, side="right") - 1
    return begins // seq_len, item, begins - firsts[item], np.diff(np.append(begins, firsts[-1]))


def _bucket(lengths: np.ndarray, seq_len: int, *, min_len: int, max_len: int) -> Segments:
    """One piece a row: the pieces of ``seq_len`` tokens, and in the smallest bucket what remains."""
    # Longer buckets have taken what is a multiple of twice this one.
    start = np.zeros_like(lengths) if seq_len == max_len else lengths - lengths % (2 * seq_len)
    full = (lengths - start) // seq_len
    item = np.repeat(np.arange(len(lengths)), full)
    begin = start[item] + (np.arange(len(item)) - np.repeat(np.cumsum(full) - full, full)) * seq_len
    length = np.full(len(item), seq_len)
    if seq_len == min_len:
        rest = lengths % min_len
        short = np.flatnonzero(rest)
        item = np.concatenate([item, short])
        begin = np.concatenate([begin, lengths[short] - rest[short]])
        length = np.concatenate([length, rest[short]])
    return np.arange(len(item)), item, begin, length

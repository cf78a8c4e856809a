"""Whether a plan is right for its shards, found without packing again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roformer_dist.data.plan import Plan
from roformer_dist.data.store import ShardStore
from roformer_dist.data.units import Units, document_groups, units_of


def verify_plan(plan: Plan | Sequence[Plan], store: ShardStore) -> str | None:
    """What is wrong with a plan, or with all plans of a folder of buckets, for ``store``; None if nothing.

    Checks that it was made for these shards, that no row is overfull, that the rows of a shard group
    hold its documents, that documents of a key are in order, and that every token is in the rows exactly
    as often as the recorded upsampling says.
    """
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    options = plans[0].options
    group, num_groups = document_groups(store, options)
    for each in plans:
        if each.manifest_root != store.root:
            return f"made for manifest root {each.manifest_root[:16]}…, these shards have {store.root[:16]}…"
        if each.options != options:
            return (
                f"rows of {each.seq_len} and of {plans[0].seq_len} tokens were packed with different options"
            )
        if problem := _structure(each, store.lengths) or _shard_groups(each, group, num_groups):
            return problem
    if problem := _lengths_of_rows(plans):
        return problem
    units = units_of(store, options)
    if options.group_by_key and (problem := _order_in_units(plans[0], units)):
        return problem
    return _coverage(plans, store.lengths, units.document_copies())


def _structure(plan: Plan, lengths: np.ndarray) -> str | None:
    """Offsets that fit the pieces, pieces that are inside documents, rows that are not overfull."""
    pieces, rows = len(plan.document), plan.num_rows
    if not len(plan.start) == len(plan.length) == len(plan.ends_document) == pieces:
        return "its arrays of pieces differ in length"
    for name, offsets, end in (
        ("row_offsets", plan.row_offsets, pieces),
        ("group_offsets", plan.group_offsets, rows),
    ):
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
            return f"{name} does not rise from 0 to {end}"
    if (np.diff(plan.row_offsets) == 0).any():
        return f"row {np.flatnonzero(np.diff(plan.row_offsets) == 0)[0]} holds nothing"
    if plan.document.min() < 0 or plan.document.max() >= len(lengths):
        return f"it has pieces of documents outside 0 to {len(lengths) - 1}"
    end = plan.start + plan.length
    outside = (plan.start < 0) | (plan.length < 1) | (end > lengths[plan.document])
    if outside.any():
        piece = int(np.flatnonzero(outside)[0])
        return (
            f"document {plan.document[piece]} has a piece of tokens {plan.start[piece]} to {end[piece] - 1}"
        )
    wrong = plan.ends_document != (end == lengths[plan.document])
    if wrong.any():
        return f"document {plan.document[wrong][0]} has a piece whose ends_document is wrong"
    filled = np.add.reduceat(plan.length, plan.row_offsets[:-1])
    if filled.max() > plan.seq_len:
        return f"row {int(filled.argmax())} holds {filled.max()} tokens, more than {plan.seq_len}"
    return None


def _shard_groups(plan: Plan, group: np.ndarray, num_groups: int) -> str | None:
    if plan.num_groups != num_groups:
        return f"it has {plan.num_groups} shard groups, its options give {num_groups}"
    of_row = np.repeat(np.arange(num_groups), np.diff(plan.group_offsets))
    of_piece = np.repeat(of_row, np.diff(plan.row_offsets))
    foreign = of_piece != group[plan.document]
    if foreign.any():
        piece = int(np.flatnonzero(foreign)[0])
        return f"document {plan.document[piece]} is in the rows of shard group {of_piece[piece]}, not its own"
    return None


def _lengths_of_rows(plans: Sequence[Plan]) -> str | None:
    """Buckets: powers of two in range, each once, one piece a row."""
    options = plans[0].options
    if options.method != "bucket":
        return None if len(plans) == 1 else "it is several plans, but not buckets"
    assert options.min_len is not None
    assert options.max_len is not None
    lengths = [plan.seq_len for plan in plans]
    allowed = {1 << bits for bits in range(options.min_len.bit_length() - 1, options.max_len.bit_length())}
    if len(set(lengths)) != len(lengths) or not set(lengths) <= allowed:
        return f"rows of {lengths} tokens are not the buckets {options.min_len} to {options.max_len}"
    several = [plan.seq_len for plan in plans if len(plan.document) != plan.num_rows]
    return f"rows of {several[0]} tokens hold several pieces" if several else None


def _order_in_units(plan: Plan, units: Units) -> str | None:
    """In every row, pieces of one key are next to each other and go on where the one before ended."""
    place = np.empty(len(units.members), np.int64)
    place[units.members] = np.arange(len(units.members))
    unit = np.searchsorted(units.offsets, place, side="right")[plan.document] - 1
    begin = units.begins[place[plan.document]] + plan.start
    row = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_offsets))
    joined = (row[1:] == row[:-1]) & (unit[1:] == unit[:-1]) & (begin[1:] == (begin + plan.length)[:-1])
    run = np.concatenate([[0], np.cumsum(~joined)])
    heads = np.concatenate([[0], np.flatnonzero(~joined) + 1])
    # A unit that is laid out n times may have n runs in one row, no more.
    runs, counts = np.unique(np.stack([row[heads], unit[heads]]), axis=1, return_counts=True)
    assert len(heads) == run[-1] + 1
    many = counts > units.copies[runs[1]]
    if many.any():
        return f"row {runs[0][many][0]}: the documents of a key are not in order next to each other"
    return None


def _coverage(plans: Sequence[Plan], lengths: np.ndarray, copies: np.ndarray) -> str | None:
    """Every token as often as ``copies`` says: as many pieces begin as end inside each document, at each place."""
    document = np.concatenate([plan.document for plan in plans])
    start = np.concatenate([plan.start for plan in plans])
    end = start + np.concatenate([plan.length for plan in plans])
    first = np.cumsum(lengths) - lengths
    begins = np.sort((first[document] + start)[start > 0])
    ends = np.sort((first[document] + end)[end < lengths[document]])
    at_start = np.bincount(document[start == 0], minlength=len(lengths))
    at_end = np.bincount(document[end == lengths[document]], minlength=len(lengths))
    wrong = (at_start != copies) | (at_end != copies)
    if len(begins) == len(ends):  # else a document has more firsts than lasts, or fewer, and is wrong already
        wrong[np.searchsorted(first, begins[begins != ends], side="right") - 1] = True
    if wrong.any():
        bad = int(np.flatnonzero(wrong)[0])
        return f"document {bad} has tokens more or less often than {copies[bad]} times"
    return None

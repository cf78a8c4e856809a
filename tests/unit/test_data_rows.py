"""Rows and batches against a plain reading of the documents, token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data_tiny import VOCAB_SIZE, tiny

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.data.objective import CausalObjective, MaskedObjective
from roformer_dist.data.rows import empty_row, make_batch, make_batches, read_row
from roformer_dist.data.store import documents

MASKED = MaskedObjective(mask_id=4, vocab_size=VOCAB_SIZE)


def plain_row(plan, row, texts, quarantined=()):
    """Tokens, targets and lengths of a row as lists, from whole documents."""
    tokens, targets, lengths = [], [], []
    joins = False
    pieces = plan.pieces(row)
    for document, start, length in zip(plan.document[pieces], plan.start[pieces], plan.length[pieces]):
        whole = texts[document].tolist()
        known = document not in quarantined
        for place in range(start, start + length):
            tokens.append(whole[place] if known else 3)
            targets.append(whole[place + 1] if known and place + 1 < len(whole) else IGNORE_INDEX)
        if known and joins:
            lengths[-1] += int(length)
        else:
            lengths.append(int(length))
        joins = known and not plan.document_mask
    left = plan.seq_len - len(tokens)
    return tokens + [3] * left, targets + [IGNORE_INDEX] * left, lengths + [left] * bool(left)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("seq_len", [16, 64, 4096])
def test_rows_are_what_the_documents_say(seq_len, document_mask):
    plan, texts = tiny().plan(seq_len), list(documents(tiny().store))
    plan = replace(plan, options=replace(plan.options, document_mask=document_mask))
    for row in range(plan.num_rows):
        for quarantined in ((), {3, 39}):
            found = read_row(tiny().store, plan, row, quarantined)
            expected = plain_row(plan, row, texts, quarantined)
            assert (found.tokens.tolist(), found.next_tokens.tolist(), found.lengths) == expected


@pytest.mark.parametrize("objective", [CausalObjective(), MASKED])
def test_a_step_at_once_equals_its_micro_batches_one_by_one(objective):
    plan, slots = tiny().plan(), np.arange(40, 46)
    read = [read_row(tiny().store, plan, row) for row in range(plan.num_rows)]
    # Of several pieces, so that each row and each micro-batch has lengths of its own.
    rows = [*[row for row in read if len(row.lengths) > 1][:5], empty_row(tiny().store, plan)]
    assert len({tuple(row.lengths) for row in rows}) == 6
    together = make_batches(iter(rows), slots, 2, objective, seed=9)
    assert len(together) == 3
    for number, batch in enumerate(together):
        part = slice(2 * number, 2 * number + 2)
        alone = make_batch(rows[part], slots[part], objective, seed=9)
        for name in ("input_ids", "labels", "position_ids", "counters"):
            assert torch.equal(getattr(batch, name), getattr(alone, name)), name
            assert getattr(batch, name).is_contiguous()
        assert torch.equal(batch.mask.cu_seqlens_q, alone.mask.cu_seqlens_q)
        assert batch.mask.cu_seqlens_q.dtype == torch.int32
        lengths = [row.lengths for row in rows[part]]
        assert batch.mask.cu_seqlens_q.diff().tolist() == [*itertools.chain(*lengths)]
        counts = [list(range(length)) for length in itertools.chain(*lengths)]
        assert batch.position_ids.flatten().tolist() == [*itertools.chain(*counts)]
        assert batch.counters.tolist() == [
            list(range(slot * plan.seq_len, (slot + 1) * plan.seq_len)) for slot in slots[part]
        ]


def test_masked_draws_are_those_of_every_token_drawn_by_itself():
    from roformer_dist.data.hashing import hash64, uniform

    row = read_row(tiny().store, tiny().plan(), 0)
    counters = np.arange(640, 640 + 64)
    inputs, labels = MASKED.apply(row.tokens, row.next_tokens, counters, 5)
    for place, counter in enumerate(counters):
        draw = [hash64(5, part, np.array([counter])) for part in range(3)]
        token, hidden = int(row.tokens[place]), row.next_tokens[place] != IGNORE_INDEX
        hidden = hidden and uniform(draw[0])[0] < 0.15
        kind = uniform(draw[1])[0]
        replaced = 4 if kind < 0.8 else int(draw[2][0]) % VOCAB_SIZE if kind < 0.8 + 0.1 else token
        assert inputs[place] == (replaced if hidden else token)
        assert labels[place] == (token if hidden else IGNORE_INDEX)


def test_some_of_the_documents_are_evenly_spaced_and_about_as_many_tokens():
    store = tiny().store
    whole = [document.tolist() for document in documents(store)]
    assert [d.tolist() for d in documents(store, most_tokens=store.num_tokens)] == whole
    most = store.num_tokens // 3
    some = [d.tolist() for d in documents(store, most_tokens=most)]
    step = -(-store.num_tokens // most)
    assert some == [document[:most] for document in whole[::step]]
    assert len(some) < len(whole)

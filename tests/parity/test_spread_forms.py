"""Layer kinds and positions that a shared sequence carries, on in-process ranks against one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import SEQ_LEN, differences, make_batch, many_ranks, model_config, one_process

from roformer_dist.batch import Batch

FORMS: dict[str, dict[str, Any]] = {
    "sliding, no_position": {"layers": ["sliding", "no_position"], "sliding_window": 4},
    "learned": {
        "position": {"kind": "learned", "max_seq_len": SEQ_LEN},
        "layers": ["sliding", "full"],
        "sliding_window": 6,
    },
    "sinusoidal": {"position": {"kind": "sinusoidal"}},
    "none": {"position": {"kind": "none"}},
    "linear": {"layers": ["linear", "full"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", [(2, 1), (1, 3), (2, 2)], ids=lambda m: "u{}r{}".format(*m))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_a_form_gives_the_gradients_of_one_process(form: str, mesh: tuple[int, int], causal: bool) -> None:
    model, batch = model_config(**FORMS[form], hidden_dropout=0.1), make_batch(causal=causal)
    reference = one_process(model, batch, masked=not causal)
    assert differences(many_ranks(mesh, model, batch, masked=not causal), reference) == []


TRADED: dict[str, dict[str, Any]] = {
    "relative_bias": {"position": {"kind": "relative_bias", "num_buckets": 8, "max_distance": 16}},
    "alibi": {"position": {"kind": "alibi"}},
    "rerope": {"rope": {"policy": {"kind": "rerope", "window": 4}}},
    "self_extend": {"rope": {"policy": {"kind": "self_extend", "window": 4, "group": 2}}},
}


@pytest.mark.parametrize("form", TRADED)
@pytest.mark.parametrize(("size", "head_chunks"), [(2, 1), (3, 1), (2, 2)])
def test_ulysses_carries_a_form(form: str, size: int, head_chunks: int) -> None:
    model, batch = model_config(**TRADED[form]), make_batch()
    reference = one_process(model, batch, masked=False)
    found = many_ranks(size, model, batch, masked=False, head_chunks=head_chunks)
    assert differences(found, reference) == []


@pytest.mark.parametrize("form", ["relative_bias", "alibi"])
@pytest.mark.parametrize(("size", "head_chunks"), [(2, 1), (3, 2)])
def test_ulysses_carries_a_bias_both_ways(form: str, size: int, head_chunks: int) -> None:
    model, batch = model_config(**TRADED[form]), make_batch(causal=False)
    reference = one_process(model, batch, masked=True)
    found = many_ranks(size, model, batch, masked=True, head_chunks=head_chunks)
    assert differences(found, reference) == []


@pytest.mark.parametrize("form", ["learned", "sinusoidal"])
def test_positions_that_restart_on_each_rank_are_noticed(form: str) -> None:
    model, batch = model_config(**FORMS[form]), make_batch()

    def restarted(part: Batch, rank: int) -> Batch:
        del rank
        return replace(part, position_ids=torch.arange(part.input_ids.shape[1]).expand_as(part.input_ids))

    reference = one_process(model, batch, masked=False)
    assert differences(many_ranks((2, 1), model, batch, masked=False, damage_slice=restarted), reference)

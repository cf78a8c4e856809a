"""Ulysses on in-process ranks against one process: the loss and every parameter's gradient.

Each planted fault below is a mistake that some framework has shipped; the comparison must reject it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import DOCUMENTS, SEQ_LEN, differences, make_batch, many_ranks, model_config, one_process
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.kernels.attention import Kernel
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.parallel.attention import ParallelSequenceOps
from roformer_dist.parallel.layout import ContiguousLayout
from roformer_dist.parallel.ulysses import UlyssesScheme


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
@pytest.mark.parametrize("block", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_ulysses_computes_what_one_process_computes(
    sp_size: int, causal: bool, block: str, pairing: str, dropout: float
) -> None:
    model = model_config(
        block=block,
        hidden_dropout=dropout,
        rope=RopeConfig(pairing=pairing),
        # The paper's block as the paper has it, today's as it is today.
        **({"norm": "layer_norm", "mlp": "gelu", "bias": True} if block == "post_norm" else {}),
    )
    batch = make_batch(causal=causal)
    reference = one_process(model, batch, masked=not causal)
    assert differences(many_ranks(sp_size, model, batch, masked=not causal), reference) == []
    assert len(reference[1]) == len(dict(build_model(model, masked=not causal, seed=0).named_parameters()))


@pytest.mark.parametrize(
    ("changes", "seq_len", "window", "kernel"),
    [
        ({"num_kv_heads": None}, SEQ_LEN, None, SdpaKernel()),
        ({"tie_embeddings": False}, SEQ_LEN, None, SdpaKernel()),
        ({"head_dim": 10}, SEQ_LEN, None, SdpaKernel()),
        ({}, 24, None, SdpaKernel()),
        ({}, 25, None, SdpaKernel()),
        ({}, SEQ_LEN, 4, SdpaKernel()),
        ({}, SEQ_LEN, None, ReferenceKernel()),
    ],
    ids=["no grouping", "untied", "head_dim", "no padding", "most padding", "window", "reference kernel"],
)
def test_other_shapes_and_kernels(
    changes: dict[str, Any], seq_len: int, window: int | None, kernel: Kernel
) -> None:
    model, batch = model_config(**changes), make_batch(seq_len=seq_len, window=window)
    reference = one_process(model, batch, masked=False, kernel=kernel)
    assert differences(many_ranks(4, model, batch, masked=False, kernel=kernel), reference) == []


def test_both_kernels_give_the_same_gradients() -> None:
    model, batch = model_config(), make_batch()
    sdpa, dense = (
        one_process(model, batch, masked=False, kernel=k) for k in (SdpaKernel(), ReferenceKernel())
    )
    assert differences(sdpa, dense) == []


def test_a_rank_without_any_target_takes_part_in_the_backward() -> None:
    model, batch = model_config(), make_batch()
    labels = batch.labels.clone()
    labels[:, 6:12] = IGNORE_INDEX  # all that rank 1 of 4 holds
    batch = replace(batch, labels=labels)
    assert ContiguousLayout(4).slice(batch, 1).num_valid == 0
    assert (
        differences(many_ranks(4, model, batch, masked=False), one_process(model, batch, masked=False)) == []
    )


# Planted faults: each is small enough to train with, and each must be found.


def rejected(model: ModelConfig, batch: Batch, *, sp_size: int = 2, **faults: Any) -> list[str]:
    return differences(
        many_ranks(sp_size, model, batch, masked=not batch.mask.causal, **faults),
        one_process(model, batch, masked=not batch.mask.causal),
    )


def test_labels_shifted_after_slicing_are_found() -> None:
    batch = make_batch()

    def shift_locally(part: Batch, rank: int) -> Batch:
        # The last token of each slice has lost its target.
        labels = part.labels.clone()
        labels[:, -1] = IGNORE_INDEX
        return replace(part, labels=labels)

    assert "loss" in rejected(model_config(), batch, damage_slice=shift_locally)


def test_positions_that_restart_in_each_slice_are_found() -> None:
    def restart(part: Batch, rank: int) -> Batch:
        return replace(part, position_ids=torch.arange(part.input_ids.shape[1]).expand_as(part.input_ids))

    wrong = rejected(model_config(), make_batch(seq_len=24), damage_slice=restart)
    assert "blocks.0.attention.q_proj.weight" in wrong


def test_counters_that_restart_in_each_slice_are_found() -> None:
    def restart(part: Batch, rank: int) -> Batch:
        return replace(part, counters=part.counters - rank * part.counters.shape[1])

    assert "loss" in rejected(model_config(hidden_dropout=0.1), make_batch(), damage_slice=restart)


def test_dividing_by_each_rank_s_own_targets_is_found() -> None:
    # The loss is right: only gradients show it.
    wrong = rejected(model_config(), make_batch(), divisor=lambda part: 2 * part.num_valid)
    assert "loss" not in wrong
    assert "embedding.weight" in wrong


class HeadsPermuted(UlyssesScheme):
    """Rank 1 hands its heads back in the wrong order."""

    def _to_sequence(self, heads: Any, x: Tensor, target: Tensor, *, adds: bool = False) -> None:
        super()._to_sequence(heads, x.flip(2) if self.comm.rank == 1 else x, target, adds=adds)


class BackwardOnly(UlyssesScheme):
    """The forward is right; the backward damages what travels home."""

    damage: Callable[[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return type(self).damage(super().backward(*arguments))


class KeysAtHalf(BackwardOnly):
    damage = staticmethod(lambda grads: (grads[0], grads[1] / 2, grads[2]))


class ValuesSlightlyOff(BackwardOnly):
    damage = staticmethod(lambda grads: (*grads[:2], grads[2] * 1.001))


class QueriesOfOneRank(UlyssesScheme):
    """Rank 1 keeps its queries' gradient to itself."""

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*arguments)
        return (dq * 0 if self.comm.rank == 1 else dq), dk, dv


class WithoutDocuments(UlyssesScheme):
    """Attention across documents, as when a framework drops the mask under sequence parallelism."""

    def forward(self, kernel: Any, q: Any, k: Any, v: Any, mask: MaskSpec, scale: float) -> Any:
        return super().forward(kernel, q, k, v, self._whole(q, mask), scale)

    def backward(self, kernel: Any, dout: Any, saved: Any, mask: MaskSpec, scale: float) -> Any:
        return super().backward(kernel, dout, saved, self._whole(dout, mask), scale)

    def _whole(self, x: Tensor, mask: MaskSpec) -> MaskSpec:
        rows = [x.shape[1] * self.comm.size] * x.shape[0]
        return MaskSpec.from_lengths(rows, causal=mask.causal)


@pytest.mark.parametrize(
    ("scheme", "loss_shows_it", "parameter"),
    [
        (HeadsPermuted, True, "blocks.0.attention.o_proj.weight"),
        (KeysAtHalf, False, "blocks.0.attention.k_proj.weight"),
        (ValuesSlightlyOff, False, "blocks.0.attention.v_proj.weight"),
        (QueriesOfOneRank, False, "blocks.0.attention.q_proj.weight"),
        (WithoutDocuments, True, "blocks.0.attention.v_proj.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_a_faulty_scheme_is_found(
    scheme: type[UlyssesScheme], loss_shows_it: bool, parameter: str, causal: bool
) -> None:
    wrong = rejected(
        model_config(),
        make_batch(causal=causal),
        make_ops=lambda mesh: ParallelSequenceOps(SdpaKernel(), scheme(mesh.ulysses)),
    )
    assert ("loss" in wrong) == loss_shows_it
    assert parameter in wrong


def test_padding_that_joins_the_last_document_is_found() -> None:
    def join(part: Batch, rank: int) -> Batch:
        # 23 tokens on 4 ranks: the 24th is padding and becomes part of each row's last document.
        lengths = [n for row in DOCUMENTS for n in (*row[:-1], row[-1] + 1)]
        return replace(part, mask=MaskSpec.from_lengths(lengths, causal=False))

    assert "loss" in rejected(model_config(), make_batch(causal=False), sp_size=4, damage_slice=join)


def test_a_missing_gradient_and_a_nan_are_found() -> None:
    loss, gradients = one_process(model_config(), make_batch(), masked=False)
    name = "blocks.1.mlp.up_proj.weight"
    missing = {n: g for n, g in gradients.items() if n != name}
    broken = {**gradients, name: gradients[name] * torch.nan}
    for damaged in (missing, broken):
        assert differences((loss, damaged), (loss, gradients)) == [name]
    assert "loss" in differences((float("nan"), gradients), (loss, gradients))


def test_a_failing_rank_ends_the_comparison_with_its_error() -> None:
    def damage(part: Batch, rank: int) -> Batch:
        if rank == 1:
            raise OverflowError("planted")
        return part

    before = threading.active_count()
    with pytest.raises(OverflowError, match="planted"):
        rejected(model_config(), make_batch(), damage_slice=damage)
    assert threading.active_count() == before

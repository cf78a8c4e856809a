"""From features to sums: which targets count, and no logits that nobody asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from roformer_dist.batch import IGNORE_INDEX, Batch, MaskSpec
from roformer_dist.config.data import ClassificationObjective
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.loss import CHUNK_ROWS, summed_cross_entropy, token_cross_entropy
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.heads import pool_weights
from roformer_dist.model.roformer import RoFormer, build_for, build_model
from roformer_dist.objectives import SummedLoss, row_logits, token_nll
from roformer_dist.parallel.sequence_ops import single_sequence_ops

VOCAB = 37
OPS = single_sequence_ops(SdpaKernel())


def network(*, masked: bool, **changes: Any) -> RoFormer:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": 24,
        "init_std": 0.3,
    }
    return build_model(ModelConfig(**values | changes), masked=masked, seed=0)


def batch_with(labels: Tensor, *, causal: bool = True) -> Batch:
    rows, seq_len = labels.shape
    ids = torch.randint(0, VOCAB, labels.shape, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(seq_len).expand(rows, seq_len)
    return Batch(ids, labels, positions, ids, MaskSpec.from_lengths([seq_len] * rows, causal=causal))


def sparse_labels(rows: int = 2, seq_len: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, VOCAB, (rows, seq_len), generator=generator)
    return labels.masked_fill(torch.rand(rows, seq_len, generator=generator) < 0.6, IGNORE_INDEX)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_sum_is_that_of_all_logits_with_ignored_targets_left_out(masked: bool, tied: bool) -> None:
    net = network(masked=masked, tie_embeddings=tied)
    if net.head.bias is not None:
        torch.nn.init.normal_(net.head.bias)
    batch = batch_with(sparse_labels(), causal=not masked)
    nll_sum, num_valid = SummedLoss(net)(batch, OPS)
    features = net.head(net(batch, OPS))
    logits = (features @ net.head.weight.T + (net.head.bias if masked else 0)).double()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert nll_sum.dtype == torch.float32
    assert nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert num_valid.item() == batch.num_valid == (batch.labels >= 0).sum()


def test_each_token_s_loss_comes_in_row_order() -> None:
    net, batch = network(masked=False), batch_with(sparse_labels())
    nll, valid = token_nll(net, batch, OPS)
    log_p = (net(batch, OPS) @ net.head.weight.T).log_softmax(-1)
    r, t = valid.nonzero(as_tuple=True)
    torch.testing.assert_close(nll, -log_p[r, t, batch.labels[r, t]])
    assert torch.equal(valid, batch.labels != IGNORE_INDEX)


class LogitRows(TorchDispatchMode):
    """Records the most rows of any tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # The weight itself is [vocab, hidden]: only its transpose is as wide as the vocabulary.
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == VOCAB and out.shape[0] != 16:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_logits_exist_at_valid_targets_only() -> None:
    net, batch = network(masked=True), batch_with(sparse_labels(), causal=False)
    transformed: list[int] = []
    net.head.register_forward_pre_hook(lambda head, given: transformed.append(given[0].shape[:-1].numel()))
    with LogitRows() as seen:
        SummedLoss(net)(batch, OPS)[0].backward()
    assert seen.rows == batch.num_valid < batch.labels.numel()
    assert transformed == [batch.num_valid]


def test_a_slice_without_targets_sums_to_0_and_has_a_backward() -> None:
    net, batch = network(masked=True), batch_with(torch.full((2, 10), IGNORE_INDEX))
    nll_sum, num_valid = SummedLoss(net)(batch, OPS)
    nll_sum.backward()
    assert (nll_sum.item(), num_valid.item()) == (0.0, 0)
    # On a rank of a group the backward's collectives must run, so every parameter has a gradient: zero.
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def head_of(
    tokens: int, *, with_bias: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """([features, weight, bias or nothing], targets)."""
    tensors = [torch.randn(tokens, 6), torch.randn(11, 6), *([torch.randn(11)] if with_bias else [])]
    return [t.to(dtype).requires_grad_() for t in tensors], torch.randint(0, 11, (tokens,))


def plain_sum(tensors: list[Tensor], targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Float64 copies, and the sum of PyTorch's own cross-entropy over them."""
    copies = [t.detach().double().requires_grad_() for t in tensors]
    return F.cross_entropy(F.linear(*copies), targets, reduction="sum"), copies


@pytest.mark.parametrize("tokens", [1, CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunks_are_plain_cross_entropy_forward_and_backward(tokens: int, with_bias: bool) -> None:
    tensors, targets = head_of(tokens, with_bias=with_bias)
    expected, copies = plain_sum(tensors, targets)
    features, weight, bias = (*tensors, None)[:3]
    found = summed_cross_entropy(features, weight, bias, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    # What follows the sum is a factor; the gradient is made before it is known.
    (found * 0.3).backward()
    (expected * 0.3).backward()
    for ours, plain in zip(tensors, copies):
        assert (ours.grad.double() - plain.grad).norm() <= 1e-5 * plain.grad.norm()
    with torch.no_grad():
        assert torch.equal(
            summed_cross_entropy(features, weight, bias, targets),
            token_cross_entropy(features, weight, bias, targets).sum(),
        )


def test_the_loss_of_single_tokens_is_for_evaluation_and_says_so_by_having_no_gradient() -> None:
    (features, weight), targets = head_of(CHUNK_ROWS + 3, with_bias=False)
    nll = token_cross_entropy(features, weight, None, targets)
    torch.testing.assert_close(nll, F.cross_entropy(features @ weight.T, targets, reduction="none"))
    assert not nll.requires_grad


def test_no_more_than_a_chunk_of_logits_exists_at_a_time() -> None:
    features = torch.randn(2 * CHUNK_ROWS + 7, 6, requires_grad=True)
    weight = torch.randn(VOCAB, 6, requires_grad=True)
    targets = torch.zeros(len(features), dtype=torch.int64)
    with LogitRows() as seen:
        summed_cross_entropy(features, weight, None, targets).backward()
        token_cross_entropy(features, weight, None, targets)
    assert seen.rows == CHUNK_ROWS


def test_bf16_logits_are_normalised_and_summed_in_float32() -> None:
    # The product is rounded to bf16; what follows is exact to 1e-6 and would be off by 2^-9 in bf16.
    (features, weight), targets = head_of(2 * CHUNK_ROWS, with_bias=False, dtype=torch.bfloat16)
    logits = F.linear(features, weight).detach().double()
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    total = summed_cross_entropy(features, weight, None, targets)
    nll = token_cross_entropy(features, weight, None, targets)
    assert total.dtype == nll.dtype == torch.float32
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert nll.double().sum().item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_rows_is_a_sum_over_those_with_a_class() -> None:
    classes = ClassificationObjective(kind="classification", num_labels=3)
    net = build_for(network(masked=True).config, classes, seed=0)
    batch = batch_with(torch.full((3, 10), IGNORE_INDEX), causal=False)
    labels, weights = torch.tensor([2, IGNORE_INDEX, 1]), pool_weights("mean", torch.tensor([10, 4, 7]), 10)
    batch = replace(batch, row_labels=labels, pool_weights=weights)
    nll_sum, num_valid = SummedLoss(net)(batch, OPS)
    nll = -row_logits(net, batch, OPS).log_softmax(-1)
    torch.testing.assert_close(nll_sum, nll[0, 2] + nll[2, 1])
    assert num_valid == 2
    assert SummedLoss(net.bfloat16())(batch, OPS)[0].dtype == torch.float32


def test_a_batch_without_classes_or_weights_is_refused_by_what_it_lacks() -> None:
    classes = ClassificationObjective(kind="classification", num_labels=3)
    net = build_for(network(masked=True).config, classes, seed=0)
    batch = replace(batch_with(sparse_labels(), causal=False), row_labels=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="needs pool_weights"):
        SummedLoss(net)(batch, OPS)
    with pytest.raises(ValueError, match="needs row_labels"):
        SummedLoss(net)(replace(batch, row_labels=None), OPS)


def test_rows_are_pooled_by_their_mean_or_by_their_first_token() -> None:
    lengths = torch.tensor([1, 3, 4])
    mean = [[1.0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4]
    torch.testing.assert_close(pool_weights("mean", lengths, 4), torch.tensor(mean))
    assert pool_weights("first", lengths, 4).tolist() == [[1, 0, 0, 0]] * 3


def test_bf16_gradients_carry_no_common_error() -> None:
    # Each number is rounded by up to 2^-9 once or twice, but in no common direction: the projection on the
    # exact gradient is right to 1e-3, also with a factor that bf16 cannot hold (1/3 is off by 1e-3 there).
    tensors, targets = head_of(2 * CHUNK_ROWS, with_bias=True, dtype=torch.bfloat16)
    expected, copies = plain_sum(tensors, targets)
    (summed_cross_entropy(*tensors, targets) * torch.tensor(0.3346)).backward()
    (expected * 0.3346).backward()
    for ours, plain in zip(tensors, copies):
        assert ours.grad.dtype == torch.bfloat16
        g, exact = ours.grad.double().flatten(), plain.grad.flatten()
        assert (g - exact).norm() <= 2**-7 * exact.norm()
        assert abs((g @ exact / (exact @ exact)).item() - 1) <= 1e-3


def test_the_weight_s_gradient_adds_up_in_float32_over_chunks() -> None:
    # Equal tokens give equal chunks: a bf16 sum of 24 of them would be off by several roundings of 2^-9.
    features = torch.randn(1, 6).expand(24 * CHUNK_ROWS, 6).bfloat16().requires_grad_()
    weight = torch.randn(11, 6).bfloat16().requires_grad_()
    targets = torch.zeros(len(features), dtype=torch.int64)
    summed_cross_entropy(features, weight, None, targets).backward()
    whole = weight.grad.double()
    weight.grad = None
    summed_cross_entropy(features[:CHUNK_ROWS], weight, None, targets[:CHUNK_ROWS]).backward()
    # Both are rounded to bf16 once at the end.
    torch.testing.assert_close(whole, 24 * weight.grad.double(), rtol=2**-7.5, atol=0)

"""The summed cross-entropy against PyTorch's, in chunks, with z-loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.kernels import loss
from roformer_dist.kernels.loss import summed_cross_entropy

TOKENS, WIDTH, VOCAB = 300, 6, 17


def draw(*, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCAB, WIDTH), *([(VOCAB,)] if bias else [])]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randint(VOCAB, (TOKENS,), generator=generator)


# Of the largest value of each tensor: its own rounding, and of bf16 also the logits' (2^-9 of numbers near 8).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cached_rows", [1, 7, TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_gradients_are_those_of_the_written_out_sum(
    z_loss: float, bias: bool, cached_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPU_LOGITS", 0)  # two chunks: 256 rows and 44
    monkeypatch.setattr(
        loss, "CACHED_NUMBERS", cached_rows * VOCAB
    )  # in parts of so many rows, the last one shorter
    leaves, targets = draw(bias=bias, dtype=dtype)
    features, weight, *rest = leaves
    found = summed_cross_entropy(features, weight, rest[0] if bias else None, targets, z_loss)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*exact)  # pyright: ignore
    nll_sum = F.cross_entropy(logits, targets, reduction="sum")
    wanted = nll_sum + z_loss * logits.logsumexp(-1).square().sum()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # A factor behind the sum, as the engine applies it.
    grads = torch.autograd.grad(found * 0.7, leaves), torch.autograd.grad(wanted * 0.7, exact)
    for got, want in zip((found, *grads[0]), (nll_sum, *grads[1]), strict=True):
        error = float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())
        assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("bias", [False, True])
def test_the_value_without_a_gradient_is_the_same(bias: bool) -> None:
    leaves, targets = draw(bias=bias)
    features, weight, *rest = leaves
    layer = weight, rest[0] if bias else None
    with_gradient = summed_cross_entropy(features, *layer, targets, 0.03).detach()
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(features, *layer, targets, 0.03), with_gradient)

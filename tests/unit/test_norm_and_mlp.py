"""The operations with their own backward against PyTorch's, and against finite differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from roformer_dist.kernels.mlp import MlpWeights, mlp
from roformer_dist.kernels.norm import CHUNK_NUMBERS, RMSNorm

TOKENS, WIDTH, INNER = 11, 6, 10


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def draw_weights(*, gate: bool, bias: bool, dtype: torch.dtype = torch.float64) -> MlpWeights:
    shapes = [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (INNER,), (INNER,), (WIDTH,)]
    wanted = [gate, True, True, gate and bias, bias, bias]
    return MlpWeights(
        *(draw(*s, seed=i, dtype=dtype) if w else None for i, (s, w) in enumerate(zip(shapes, wanted)))
    )  # pyright: ignore


def plain_mlp(x: Tensor, w: MlpWeights) -> Tensor:
    up = F.linear(x, w.up, w.up_bias)
    hidden = F.gelu(up) if w.gate is None else F.silu(F.linear(x, w.gate, w.gate_bias)) * up
    return F.linear(hidden, w.down, w.down_bias)


@pytest.mark.parametrize("tile_tokens", [None, 4, 11, 50])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True], ids=["gelu", "swiglu"])
def test_mlp_is_the_plain_one_with_every_gradient(gate: bool, bias: bool, tile_tokens: int | None) -> None:
    weights = draw_weights(gate=gate, bias=bias)
    x = draw(1, TOKENS, WIDTH, seed=9)
    leaves = [x, *(w for w in weights if w is not None)]
    out, expected = mlp(x, weights, tile_tokens), plain_mlp(x, weights)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    for got, want in zip(found, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(got, want)


class InnerRows(TorchDispatchMode):
    """Notes the most tokens for which a tensor of the inner width exists."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == INNER and out.shape[0] != WIDTH:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize(("tile_tokens", "rows"), [(None, TOKENS), (4, 4)])
@pytest.mark.parametrize("gate", [False, True], ids=["gelu", "swiglu"])
def test_no_more_than_a_tile_of_the_inner_width_exists(
    gate: bool, tile_tokens: int | None, rows: int
) -> None:
    weights, x = draw_weights(gate=gate, bias=False), draw(1, TOKENS, WIDTH, seed=9)
    with InnerRows() as forward:
        out = mlp(x, weights, tile_tokens)
    with InnerRows() as backward:
        out.sum().backward()
    assert (forward.rows, backward.rows) == (rows, rows)


def test_chunks_of_the_mlp_backward_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 chunks of one token each; bf16 sums would be off by several per cent.
    weights = draw_weights(gate=True, bias=False, dtype=torch.bfloat16)
    x = draw(512, WIDTH, seed=9, dtype=torch.bfloat16)
    leaves = [w for w in weights if w is not None]
    whole = torch.autograd.grad(mlp(x, weights).sum(), leaves)
    tiled = torch.autograd.grad(mlp(x, weights, 1).sum(), leaves)
    for got, want in zip(tiled, whole, strict=True):
        assert float((got - want).float().norm() / want.float().norm()) < 2**-7


# The largest needs two chunks.
@pytest.mark.parametrize("rows", [1, 5, CHUNK_NUMBERS // WIDTH + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_pytorchs(rows: int, dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(WIDTH, eps=1e-6), torch.nn.RMSNorm(WIDTH, eps=1e-6).double()
    ours.weight.data = draw(WIDTH, seed=1, dtype=dtype).data
    theirs.weight.data = ours.weight.data.double()
    x = draw(1, rows, WIDTH, seed=2, dtype=dtype)
    reference = x.detach().double().requires_grad_()
    out, expected = ours.to(dtype)(x), theirs(reference)
    dout = draw(1, rows, WIDTH, seed=3, dtype=dtype).detach()
    found = torch.autograd.grad(out, [x, ours.weight], dout)
    wanted = torch.autograd.grad(expected, [reference, theirs.weight], dout.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert got.dtype == dtype
        assert float((got.double() - want).detach().norm() / want.detach().norm()) < tolerance
    if (
        dtype == torch.bfloat16
    ):  # rounded before the weight is applied, and after; float32 is near a tie now and then
        unit = F.rms_norm(x.detach().float(), (WIDTH,), eps=1e-6).to(dtype)
        assert (out == unit * ours.weight).double().mean() > 0.99


def test_rms_norm_takes_any_strides() -> None:
    norm = RMSNorm(WIDTH, eps=1e-6).double()
    x = draw(WIDTH, 4, 3, seed=2)
    strided = x.permute(2, 1, 0)
    found = torch.autograd.grad(norm(strided).sum(), x)[0]
    wanted = torch.autograd.grad(F.rms_norm(strided, (WIDTH,), norm.weight, 1e-6).sum(), x)[0]
    torch.testing.assert_close(found, wanted)

"""The check that a kernel passes before it is used: faults that show in one kind of mask, one number or one dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels import rotation
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.kernels.selfcheck import check_kernel, check_rotation

CPU = torch.device("cpu")


class Deaf(SdpaKernel):
    """A kernel that does not hear one word of a mask."""

    def __init__(self, **heard: object) -> None:
        self.heard = heard

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, v, replace(mask, **self.heard), softmax_scale)  # pyright: ignore


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (Deaf(causal=True), "documents seen both ways"),
        (Deaf(window=None), "a causal window"),
        (Deaf(k_offset=None), "offsets"),
    ],
)
def test_every_kind_of_mask_is_checked(kernel: Deaf, named: str) -> None:
    assert f"of {named}," in str(check_kernel(kernel, CPU, torch.bfloat16))


class SeesNothing(SdpaKernel):
    """A kernel that says 0 of a query without keys, which a merge of partial results would count."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, mask, softmax_scale)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    def backward(self, dout: Tensor, *rest: Tensor | MaskSpec | float) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, _, mask, scale = rest
        _, right = super().forward(q, k, v, mask, scale)  # pyright: ignore
        return super().backward(dout, q, k, v, out, right, mask, scale)  # pyright: ignore


def test_the_lse_of_a_query_without_keys_is_checked() -> None:
    assert "of offsets," in str(check_kernel(SeesNothing(), CPU, torch.bfloat16))


def test_the_gradient_of_a_rotation_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rotation._Rotate.backward

    def wrong(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, *nothing = right(ctx, grad)
        return (-dx if grad.dtype == torch.bfloat16 else dx, *nothing)

    monkeypatch.setattr(rotation._Rotate, "backward", staticmethod(wrong))
    assert "pairing interleaved is off by" in str(check_rotation(CPU, torch.bfloat16))

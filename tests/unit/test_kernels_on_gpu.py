"""Every CUDA kernel's numerics against float64, forward and all gradients. Needs a GPU; nothing else is skipped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_kernels import CASES, Case

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel, choose_kernel, flash_attn_missing
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.selfcheck import BOUND, check_rotation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

NAMES = ["varlen", "flash_attn"]
LENGTHS = {
    "odd lengths": [1, 63, 129, 1000, 7],
    "hundreds of documents": [1 + 7 * i % 23 for i in range(400)],
    "one-token documents": [1] * 65,
    "one long document": [4097],
}


def chosen(name: str) -> Kernel:
    device = torch.device("cuda")
    if name == "flash_attn" and (missing := flash_attn_missing(device)):
        pytest.skip(missing)
    return choose_kernel(name, device)[0]


def check(
    kernel: Kernel, mask: MaskSpec, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_q, tokens_k = int(mask.cu_seqlens_q[-1]), int(mask.cu_seqlens_k[-1])
    shapes = [(tokens_q, heads), (tokens_k, kv_heads), (tokens_k, kv_heads), (tokens_q, heads)]
    tensors = [torch.randn(*s, head_dim, generator=generator).to("cuda", dtype) for s in shapes]
    mask = mask.to("cuda")
    results = []
    for which, (q, k, v, dout) in (
        (kernel, tensors),
        (ReferenceKernel(), [x.double() for x in tensors]),
    ):
        out, lse = which.forward(q, k, v, mask, head_dim**-0.5)
        results.append((out, lse, *which.backward(dout, q, k, v, out, lse, mask, head_dim**-0.5)))
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        blind = want == -torch.inf
        assert torch.equal(got == -torch.inf, blind), name
        error = (got.double() - want).masked_fill(blind, 0).abs().max()
        scale = want.masked_fill(blind, 0).abs().max().clamp(min=1)
        assert float(error) <= BOUND * float(scale), (name, float(error), float(scale))


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_self_attention(
    name: str, head_dim: int, heads: int, kv_heads: int, lengths: list[int], causal: bool, window: int | None
) -> None:
    mask = MaskSpec.from_lengths(lengths, causal=causal, window=window)
    check(chosen(name), mask, heads, kv_heads, head_dim, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_offsets_windows_and_blind_queries(name: str, case: Case, dtype: torch.dtype) -> None:
    check(chosen(name), case.mask, case.num_heads, case.num_kv_heads, 64, dtype)


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(0, 70), st.integers(0, 70)),
        min_size=1,
        max_size=6,
    ).filter(lambda ds: sum(d[0] for d in ds) > 0 and sum(d[1] for d in ds) > 0),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
)
@hypothesis_settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", NAMES)
def test_any_mask(
    name: str,
    documents: list[tuple[int, int, int, int]],
    causal: bool,
    window: int | None,
    kv_heads: int,
    group: int,
) -> None:
    case = Case(tuple(documents), causal, window, kv_heads * group, kv_heads)
    check(chosen(name), case.mask, kv_heads * group, kv_heads, 64, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rotation(dtype: torch.dtype) -> None:
    assert check_rotation(torch.device("cuda"), dtype) is None

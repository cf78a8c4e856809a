"""Each kernel against attention written out in float64, differentiated by autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from roformer_dist.batch import MaskSpec
from roformer_dist.kernels.attention import Kernel, choose_kernel
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.parallel.sequence_ops import single_sequence_ops

KERNELS: list[Kernel] = [SdpaKernel(), ReferenceKernel()]
HEAD_DIM = 8
SCALE = 0.6  # not 1/sqrt(head_dim): the argument must be used

# Errors relative to the largest number of the tensor. float32: some hundred products and sums of 6e-8
# each. bf16: probabilities, block results and outputs are each rounded by 2^-9, and a gradient is a
# chain of three such products.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """Documents as (queries, keys, q_offset, k_offset)."""

    documents: tuple[tuple[int, int, int, int], ...]
    causal: bool = True
    window: int | None = None
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = HEAD_DIM

    @property
    def mask(self) -> MaskSpec:
        q_lens, k_lens, q_offsets, k_offsets = (list(column) for column in zip(*self.documents))
        as_q, as_k = (MaskSpec.from_lengths(lens, causal=self.causal) for lens in (q_lens, k_lens))
        return MaskSpec(
            as_q.cu_seqlens_q,
            as_k.cu_seqlens_k,
            as_q.max_q,
            as_k.max_k,
            self.causal,
            torch.tensor(q_offsets, dtype=torch.int32),
            torch.tensor(k_offsets, dtype=torch.int32),
            self.window,
        )

    @property
    def visible(self) -> Tensor:
        """bool [tokens_q, tokens_k], from the words of MaskSpec alone."""
        queries = [(d, qo + t) for d, (q, _, qo, _) in enumerate(self.documents) for t in range(q)]
        keys = [(d, ko + s) for d, (_, k, _, ko) in enumerate(self.documents) for s in range(k)]
        seen = torch.zeros(len(queries), len(keys), dtype=torch.bool)
        for i, (d, p) in enumerate(queries):
            for j, (e, r) in enumerate(keys):
                near = self.window is None or abs(p - r) < self.window
                seen[i, j] = d == e and near and not (self.causal and r > p)
        return seen


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 by the definition; queries without keys give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("tnd,und->ntu", q, k) * SCALE
    seen_any = visible.any(-1)
    # Rows without keys get finite scores here and are set to 0 afterwards, so that no NaN has a gradient.
    safe = scores.masked_fill(~(visible | ~seen_any[:, None]), -torch.inf)
    probabilities = safe.softmax(-1) * visible
    lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1).detach()
    return torch.einsum("ntu,und->tnd", probabilities, v), lse


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, dout); scores and their gradients are as large for any head_dim."""
    generator = torch.Generator().manual_seed(seed)
    tokens_q = sum(d[0] for d in case.documents)
    tokens_k = sum(d[1] for d in case.documents)
    shapes = [(tokens_q, case.num_heads), (tokens_k, case.num_kv_heads), (tokens_k, case.num_kv_heads)]
    shapes.append((tokens_q, case.num_heads))
    q, k, v, dout = (torch.randn(*shape, case.head_dim, generator=generator).to(dtype) for shape in shapes)
    narrower = (HEAD_DIM / case.head_dim) ** 0.5
    return q * narrower, k, v, dout * narrower


def expected_of(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, case.visible)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.double(), materialize_grads=True)
    return {"out": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def assert_close(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float,
    scales: dict[str, float] | None = None,
) -> None:
    """Errors are at most ``tolerance`` of ``scales``; default: of the largest number of a tensor, 1 at least."""
    for name, want in expected.items():
        got, finite = found[name].double(), want.isfinite()
        assert torch.equal(got.isneginf(), want.isneginf()), name
        error = (got - want)[finite].abs().tolist()
        scale = scales[name] if scales else max([1.0, *want[finite].abs().tolist()])
        # Written so that a NaN fails.
        assert all(e <= tolerance * scale for e in error), (name, max(error), scale)


def magnitudes(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, float]:
    """For each result the largest sum of absolute values of its terms: they are rounded, even where they cancel."""
    group, visible = case.num_heads // case.num_kv_heads, case.visible
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("tnd,und->ntu", q, k) * SCALE
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    q, k, v, dout = (x.abs() for x in (q, k, v, dout))
    d_probabilities = torch.einsum("tnd,und->ntu", dout, v)
    d_scores = probabilities * (d_probabilities + (probabilities * d_probabilities).sum(-1, keepdim=True))
    terms = {
        "out": torch.einsum("ntu,und->tnd", probabilities, v),
        "lse": torch.einsum("tnd,und->ntu", q, k) * SCALE * visible,
        "dq": torch.einsum("ntu,und->tnd", d_scores, k) * SCALE,
        "dk": torch.einsum("ntu,tnd->und", d_scores, q).unflatten(1, (-1, group)).sum(2) * SCALE,
        "dv": torch.einsum("ntu,tnd->und", probabilities, dout).unflatten(1, (-1, group)).sum(2),
    }
    return {name: max([1.0, *sums.flatten().tolist()]) for name, sums in terms.items()}


def check(kernel: Kernel, case: Case, dtype: torch.dtype, seed: int = 0, *, by_terms: bool = False) -> None:
    """
    Args:
        by_terms: errors are measured by what is summed, instead of by the sums.
    """
    q, k, v, dout = draw(case, dtype, seed)
    out, lse = kernel.forward(q, k, v, case.mask, SCALE)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, case.mask, SCALE)
    assert lse.dtype == torch.float32
    assert {x.dtype for x in (out, dq, dk, dv)} == {dtype}
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    scales = magnitudes(case, q, k, v, dout) if by_terms else None
    assert_close(found, expected_of(case, q, k, v, dout), TOLERANCE[dtype], scales)


def self_attention(*lengths: int) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((n, n, 0, 0) for n in lengths)


CASES = {
    "one document": Case(self_attention(13)),
    "documents of odd lengths": Case(self_attention(5, 1, 7, 3)),
    "equal documents, which share a call": Case(self_attention(4, 4, 4, 1, 1, 6)),
    "both ways": Case(self_attention(5, 1, 7), causal=False),
    "one-token documents": Case(self_attention(1, 1, 1, 1)),
    "grouped-query heads": Case(self_attention(6, 3), num_heads=6, num_kv_heads=2),
    "one key head": Case(self_attention(6, 3), causal=False, num_heads=4, num_kv_heads=1),
    "fewer queries than keys, at the end": Case(((3, 11, 8, 0),)),
    "fewer queries than keys, at the start": Case(((3, 11, 0, 0),)),
    "fewer queries than keys, both ways": Case(((3, 11, 0, 0), (2, 5, 0, 0)), causal=False),
    "more queries than keys": Case(((11, 3, 0, 0),)),
    "keys further on: no query sees any": Case(((4, 4, 0, 4), (2, 2, 0, 0))),
    "keys further on: the first queries see none": Case(((6, 4, 0, 3), (5, 2, 1, 4))),
    "keys behind: every query sees all": Case(((4, 4, 4, 0),)),
    "offsets that differ between equal documents": Case(
        ((4, 4, 0, 0), (4, 4, 2, 0), (4, 4, 2, 0), (4, 4, 0, 2))
    ),
    "documents without queries or keys": Case(((0, 3, 0, 0), (2, 0, 0, 0), (3, 3, 0, 0), (0, 0, 0, 0))),
    "a window": Case(self_attention(17, 2), window=4),
    "a window of one": Case(self_attention(5, 2), window=1),
    "a window both ways": Case(self_attention(17, 3), causal=False, window=3),
    "a window wider than the document": Case(self_attention(5), window=50),
    "a window, offsets and grouped heads": Case(
        ((9, 12, 3, 0), (4, 7, 0, 2)), window=3, num_heads=4, num_kv_heads=2
    ),
    "a window that the queries have left": Case(((4, 4, 20, 0),), window=5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_forward_and_backward_are_dense_attention(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_longer_than_the_tiles_of_the_flash_kernel(kernel: Kernel) -> None:
    # PyTorch's CPU kernel works on tiles of 32 to 512 tokens; lengths here are beyond several of them.
    check(kernel, Case(((70, 600, 531, 1), (65, 65, 0, 0)), num_heads=2, num_kv_heads=1), torch.float32)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_query_that_sees_no_key_gives_0_and_no_nan(kernel: Kernel) -> None:
    case = Case(((3, 2, 0, 2), (2, 0, 0, 0)))
    q, k, v, dout = draw(case, torch.float32)
    out, lse = kernel.forward(q, k, v, case.mask, SCALE)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, case.mask, SCALE)
    blind = [0, 1, 3, 4]
    assert torch.equal(lse[:, blind], torch.full((2, 4), -torch.inf))
    assert torch.equal(out[blind], torch.zeros(4, 2, HEAD_DIM))
    assert torch.equal(dq[blind], torch.zeros(4, 2, HEAD_DIM))
    assert lse[:, 2].isfinite().all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


documents = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7)),
    min_size=1,
    max_size=4,
)


@given(
    documents=documents,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([HEAD_DIM, 32, 40, 64, 80, 96, 128, 192, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@hypothesis_settings(max_examples=150)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_any_documents_offsets_windows_and_groups(
    kernel: Kernel,
    documents: list[tuple[int, int, int, int]],
    causal: bool,
    window: int | None,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = Case(tuple(documents), causal, window, num_kv_heads * group, num_kv_heads, head_dim)
    check(kernel, case, dtype, seed, by_terms=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(self_attention(9, 4, 1)),
        Case(self_attention(9, 4, 1), causal=False, num_heads=4),
        Case(((5, 8, 3, 0), (6, 6, 0, 3), (3, 3, 0, 0)), window=4),
    ],
    ids=["causal", "both ways, grouped", "window, offsets, blind queries"],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_two_halves_of_the_keys_add_up_to_the_whole(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    # What a ring does: forward on the visiting keys, merge by lse, and backward on them with the merged
    # out and lse.
    q, k, v, dout = draw(case, dtype)
    first, second, owner = [], [], []
    for q_len, k_len, q_offset, k_offset in case.documents:
        half = k_len // 2
        first.append((q_len, half, q_offset, k_offset))
        second.append((q_len, k_len - half, q_offset, k_offset + half))
        owner += [0] * half + [1] * (k_len - half)
    places = [torch.tensor(owner) == i for i in range(2)]
    masks = [replace(case, documents=tuple(part)).mask for part in (first, second)]
    parts = [kernel.forward(q, k[at], v[at], mask, SCALE) for at, mask in zip(places, masks)]

    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part_lse - lse).exp().nan_to_num(0).T[..., None] for _, part_lse in parts]
    out = sum(weight * part.float() for weight, (part, _) in zip(weights, parts)).to(dtype)

    dq = torch.zeros(q.shape)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for at, mask in zip(places, masks):
        dq_part, dk[at], dv[at] = kernel.backward(dout, q, k[at], v[at], out, lse, mask, SCALE)
        dq += dq_part
    expected = expected_of(case, q, k, v, dout)
    assert_close({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_any_strides_of_inputs_and_gradients(kernel: Kernel) -> None:
    # sum() hands down a gradient that is one number expanded; heads-first tensors are transposed views.
    case = Case(self_attention(5, 4, 4))
    q, k, v, _ = draw(case, torch.float32)
    strided = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0)[None].requires_grad_() for x in (q, k, v)]
    out = single_sequence_ops(kernel).attend(*strided, case.mask, SCALE)
    out.sum().backward()
    expected = expected_of(case, q, k, v, torch.ones_like(q))
    found = {"out": out[0].detach(), **{n: x.grad[0] for n, x in zip(("dq", "dk", "dv"), strided)}}
    expected.pop("lse")
    assert_close(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_scores_too_large_for_exp_are_no_trouble(kernel: Kernel) -> None:
    case = Case(self_attention(6), causal=True)
    q, k, v, dout = draw(case, torch.float32)
    q = q * 300
    out, lse = kernel.forward(q, k, v, case.mask, SCALE)
    expected = expected_of(case, q, k, v, dout)
    assert_close({"out": out, "lse": lse}, {n: expected[n] for n in ("out", "lse")}, 1e-4)


def test_the_choice_of_a_kernel_names_its_reason() -> None:
    for name, kind in (("auto", "sdpa"), ("sdpa", "sdpa"), ("reference", "reference")):
        kernel, why = choose_kernel(name, "cpu")
        assert kernel.name == kind
        assert why
    assert "asked for" in choose_kernel("sdpa", "cpu")[1]
    assert "asked for" not in choose_kernel("auto", "cpu")[1]
    assert choose_kernel("reference", "cuda")[0].name == "reference"


WIDE = [
    # head_dim, heads, key heads, document lengths, window: each value of each column at least twice.
    (32, 4, 4, [1] * 40, None),
    (48, 6, 2, [97, 1, 30], 16),
    (64, 8, 1, [3 + 5 * i % 17 for i in range(200)], None),
    (80, 4, 2, [97, 1, 30], None),
    (96, 6, 3, [1] * 40, 5),
    (128, 8, 2, [129, 64, 31], 40),
    (192, 2, 1, [129, 64, 31], None),
    (256, 4, 4, [3 + 5 * i % 17 for i in range(200)], 6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "lengths", "window"), WIDE, ids=[f"head_dim {row[0]}" for row in WIDE]
)
def test_head_dims_groups_and_many_documents(
    head_dim: int,
    heads: int,
    kv_heads: int,
    lengths: list[int],
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
) -> None:
    mask = MaskSpec.from_lengths(lengths, causal=causal, window=window)
    generator = torch.Generator().manual_seed(0)
    widths = (heads, kv_heads, kv_heads, heads)
    q, k, v, dout = (torch.randn(sum(lengths), n, head_dim, generator=generator).to(dtype) for n in widths)
    results = []
    for kernel, inputs in (
        (SdpaKernel(), (q, k, v, dout)),
        (ReferenceKernel(), tuple(x.double() for x in (q, k, v, dout))),
    ):
        a, b, c, d = inputs
        out, lse = kernel.forward(a, b, c, mask, head_dim**-0.5)
        results.append((out, lse, *kernel.backward(d, a, b, c, out, lse, mask, head_dim**-0.5)))
    names = ("out", "lse", "dq", "dk", "dv")
    found, expected = (dict(zip(names, result)) for result in results)
    assert_close(found, expected, TOLERANCE[dtype])

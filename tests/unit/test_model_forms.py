"""Layer kinds, positions and score policies: the whole trunk against a dense float64 definition, with all gradients.

The definition rotates nothing: a score is ``Re sum_i q_i conj(k_i) exp(1j r theta_i)`` for pairs as complex numbers,
where r is what the form under test says about the distance of the two tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.linear_attention import LinearScores
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.model.rotary import Phases
from roformer_dist.parallel.sequence_ops import single_sequence_ops

OPS = single_sequence_ops(SdpaKernel())
LENGTHS = [9, 1, 20, 30]  # two rows of 30
PLACES = torch.cat([torch.arange(n) for n in LENGTHS])
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
BUCKETS, MAX_DISTANCE = 8, 12

RELATIVE = {"kind": "relative_bias", "num_buckets": BUCKETS, "max_distance": MAX_DISTANCE}
CAUSAL_ONLY: dict[str, dict[str, Any]] = {
    "rerope": {"rope": {"policy": {"kind": "rerope", "window": 4}}},
    "rerope of which nothing is far": {"rope": {"policy": {"kind": "rerope", "window": 40}}},
    "rerope in a sliding layer": {
        "rope": {"policy": {"kind": "rerope", "window": 4}, "pairing": "half"},
        "layers": ["sliding", "full"],
        "sliding_window": 9,
    },
    "rerope in a narrow sliding layer": {
        "rope": {"policy": {"kind": "rerope", "window": 7}},
        "layers": ["full", "sliding"],
        "sliding_window": 3,
    },
    "rerope and no position": {
        "rope": {"policy": {"kind": "rerope", "window": 4}},
        "layers": ["full", "no_position"],
    },
    "self_extend": {"rope": {"policy": {"kind": "self_extend", "window": 6, "group": 3}}},
    "self_extend, uneven": {"rope": {"policy": {"kind": "self_extend", "window": 7, "group": 4}}},
}
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {"rope": {"pairing": "half"}},
    "rotary_value": {"rope": {"rotary_value": True}},
    "sliding": {"layers": ["sliding", "full"], "sliding_window": 3},
    "sliding by one": {"layers": ["sliding", "full"], "sliding_window": 1},
    "no_position": {"layers": ["no_position", "full"]},
    "linear": {"layers": ["linear"]},
    "linear, softmax": {"layers": ["full", "linear"], "linear_features": "softmax", "qk_norm": True},
    "linear without position": {"layers": ["linear"], "position": {"kind": "none"}},
    "learned": {"position": {"kind": "learned", "max_seq_len": 30}},
    "learned and linear": {"position": {"kind": "learned", "max_seq_len": 30}, "layers": ["linear", "full"]},
    "sinusoidal": {"position": {"kind": "sinusoidal"}},
    "relative_bias": {"position": RELATIVE},
    "relative_bias, sliding": {
        "position": RELATIVE,
        "layers": ["sliding", "no_position", "full"],
        "sliding_window": 5,
        "num_layers": 3,
    },
    "alibi": {"position": {"kind": "alibi"}, "num_heads": 6},
    "alibi, sliding": {"position": {"kind": "alibi"}, "layers": ["sliding"], "sliding_window": 4},
    "none": {"position": {"kind": "none"}},
}
CASES = [(name, True) for name in CAUSAL_ONLY] + [(n, causal) for n in BOTH_WAYS for causal in (True, False)]


def network_of(name: str, dtype: torch.dtype) -> RoFormer:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 20,
        "init_std": 0.3,
    }
    model = ModelConfig(**values | (CAUSAL_ONLY | BOTH_WAYS)[name])
    return build_model(model, masked=False, seed=0).to(dtype)


def make_batch(*, causal: bool) -> Batch:
    ids = torch.randint(0, 31, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = MaskSpec.from_lengths(LENGTHS, causal=causal)
    return Batch(ids, ids, PLACES.view(2, 30), torch.arange(60).view(2, 30), mask)


def relative_position(model: ModelConfig, kind: str) -> Tensor:
    """What a rotated score goes by, for every query and key: float64 ``[T, U]``."""
    m, n = PLACES[:, None].double(), PLACES[None].double()
    policy: Any = model.rope.policy
    if kind == "no_position" or model.position.kind != "rotary":
        return 0 * (m - n)
    if policy.kind == "rerope":
        return torch.minimum(m - n, torch.tensor(policy.window))
    if policy.kind == "self_extend":
        w, g = policy.window, policy.group
        return torch.where(m - n < w, m - n, (m / g).floor() - (n / g).floor() + w - w // g)
    return m - n


def as_complex(x: Tensor, pairing: str) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2)) if pairing == "interleaved" else x.unflatten(-1, (2, -1)).mT
    return torch.complex(pairs[..., 0], pairs[..., 1])


def angles(model: ModelConfig) -> Tensor:
    d = model.head_size
    return torch.tensor([model.rope.theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)


def products(q: Tensor, k: Tensor, relative: Tensor, model: ModelConfig) -> Tensor:
    """``[N, T, U]``."""
    turn = torch.exp(1j * relative[..., None] * angles(model))
    q, k = (as_complex(x, model.rope.pairing) for x in (q, k))
    return torch.einsum("tni,uni,tui->ntu", q, k.conj(), turn).real


def turned(v: Tensor, model: ModelConfig) -> Tensor:
    turn = torch.exp(1j * PLACES[:, None].double() * angles(model))[:, None]
    pairs = torch.view_as_real(as_complex(v, model.rope.pairing) * turn)
    return pairs.flatten(-2) if model.rope.pairing == "interleaved" else pairs.mT.flatten(-2)


def bucket(distance: int, *, causal: bool) -> int:
    """T5's rule in whole numbers: bucket exact + j begins where (n / exact) ** count >= (max / exact) ** j."""
    count = BUCKETS if causal else BUCKETS // 2
    upper = 0 if causal or distance >= 0 else count
    n, exact = max(distance, 0) if causal else abs(distance), count // 2
    if n < exact:
        return upper + n
    rest = count - exact
    j = sum(n**rest * exact**j >= MAX_DISTANCE**j * exact**rest for j in range(1, rest))
    return upper + exact + j


def bias(w: dict[str, Tensor], model: ModelConfig, *, causal: bool) -> Tensor | float:
    distance = PLACES[:, None] - PLACES
    if model.position.kind == "alibi":
        slopes = {4: [2**-2, 2**-4, 2**-6, 2**-8], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}
        return -torch.tensor(slopes[model.num_heads])[:, None, None] * distance.abs().double()
    if model.position.kind == "relative_bias":
        places = [[bucket(d, causal=causal) for d in row] for row in distance.tolist()]
        return w["positions.relative_bias.table.weight"][torch.tensor(places)].permute(2, 0, 1)
    return 0.0


def attention(
    x: Tensor, name: str, kind: str, w: dict[str, Tensor], model: ModelConfig, seen: Tensor
) -> Tensor:
    def heads(p: str) -> Tensor:
        y = (x @ w[f"{name}.{p}_proj.weight"].T).unflatten(1, (-1, model.head_size))
        if model.qk_norm and p in "qk":
            y = y / (y.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * w[f"{name}.{p}_norm.weight"]
        return y if p == "q" else y.repeat_interleave(model.num_heads // model.kv_heads, dim=1)

    q, k, v = (heads(p) for p in "qkv")
    relative, causal = (
        relative_position(model, kind),
        bool(seen.sum() < (DOCUMENTS[:, None] == DOCUMENTS).sum()),
    )
    if kind == "linear":
        if model.linear_features == "elu":
            q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
        else:
            q, k = q.softmax(-1), k.exp()
        numerator = products(q, k, relative, model) * seen
        weights = numerator / (torch.einsum("tnd,und->ntu", q, k) * seen).sum(-1, keepdim=True)
    else:
        scores = products(q, k, relative, model) / math.sqrt(model.head_size)
        if kind != "no_position":
            scores = scores + bias(w, model, causal=causal)
        if kind == "sliding":
            assert model.sliding_window
            seen = seen & ((PLACES[:, None] - PLACES).abs() < model.sliding_window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    v = turned(v, model) if model.rope.rotary_value else v
    return torch.einsum("ntu,und->tnd", weights, v).flatten(1) @ w[f"{name}.o_proj.weight"].T


def dense_features(network: RoFormer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The trunk of ``network`` in float64 over all tokens ``[60, C]``, and the copies of parameters it is made of."""
    model = network.config
    w = {name: p.detach().double().requires_grad_() for name, p in network.named_parameters()}
    seen = DOCUMENTS[:, None] == DOCUMENTS
    if batch.mask.causal:
        seen = seen & (PLACES[:, None] >= PLACES)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * w[f"{name}.weight"]

    x = w["embedding.weight"][batch.input_ids.flatten()]
    if model.position.kind == "learned":
        x = x + w["positions.added.table.weight"][PLACES]
    if model.position.kind == "sinusoidal":
        at = [
            [
                (math.sin, math.cos)[c % 2](p / 10000 ** ((c - c % 2) / model.hidden_size))
                for c in range(model.hidden_size)
            ]
            for p in PLACES.tolist()
        ]
        x = x + model.init_std * torch.tensor(at, dtype=torch.float64)
    for i in range(model.num_layers):
        name, kind = f"blocks.{i}", model.layers[i % len(model.layers)]
        x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention", kind, w, model, seen)
        y = norm(x, f"{name}.mlp_norm")
        gate, up = (y @ w[f"{name}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{name}.mlp.down_proj.weight"].T
    return norm(x, "final_norm"), w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "causal"), CASES, ids=lambda x: x if isinstance(x, str) else f"causal-{x}")
def test_every_form_is_its_dense_definition(name: str, causal: bool, dtype: torch.dtype) -> None:
    network, batch = network_of(name, dtype), make_batch(causal=causal)
    found = network(batch, OPS).flatten(0, 1)
    wanted, copies = dense_features(network, batch)
    # In float64 what is left are cos, sin and sines, kept in float32 (6e-8).
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found.backward(upstream.to(dtype))
    wanted.backward(upstream)
    expected = {n: p.grad for n, p in copies.items() if p.grad is not None}
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        want = expected[parameter_name]
        error = (parameter.grad.double() - want).norm()
        bound = tolerance * max(want.norm(), 1e-3 * total)
        if not want.any():
            # Of queries that see one key: terms as large as other gradients cancel, but for their rounding.
            bound = max(bound, torch.finfo(dtype).eps * total)
        assert error <= bound, parameter_name


@pytest.mark.parametrize("features", ["elu", "softmax"])
def test_linear_attention_is_the_recurrence_of_one_state_a_document(features: str) -> None:
    """Equation 19 step by step: S += R phi(k) v^T and z += phi(k); R turns what meets S and never what meets z."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    turns = PLACES.double().view(2, 30, 1) * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    phases = Phases(turns.cos().float(), turns.sin().float(), "interleaved")
    mask = MaskSpec.from_lengths(LENGTHS, causal=True)
    found = LinearScores(mask, phases, features)(q, k, v, OPS)  # pyright: ignore[reportArgumentType]

    out = torch.empty(60, 2, 8, dtype=torch.float64)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    state, total = torch.zeros(2, 8, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    for t, place in enumerate(PLACES.tolist()):
        if place == 0:
            state, total = torch.zeros_like(state), torch.zeros_like(total)
        matrix = torch.zeros(8, 8, dtype=torch.float64)
        for i in range(4):
            c, s = (float(x.flatten(0, 1)[t, i]) for x in (phases.cos, phases.sin))
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]])
        if features == "elu":
            a, b = (torch.nn.functional.elu(x[t]) + 1 for x in (flat_q, flat_k))
        else:
            a, b = flat_q[t].softmax(-1), flat_k[t].exp()
        state = state + torch.einsum("nd,ne->nde", b @ matrix.T, flat_v[t])
        total = total + b
        out[t] = torch.einsum("nd,nde->ne", a @ matrix.T, state) / (a * total).sum(-1, keepdim=True)
    torch.testing.assert_close(found.flatten(0, 1), out, rtol=1e-11, atol=1e-11)


def test_a_window_and_a_policy_are_about_distances_in_a_document_not_places_in_a_row() -> None:
    # The second row is the third document of the first row, alone and further right or left.
    network = network_of("rerope in a sliding layer", torch.float64)
    ids = make_batch(causal=True).input_ids
    packed, alone = ids[:1], torch.cat([ids[:1, 10:], ids[:1, :10]], 1)
    outs = []
    for row, lengths in ((packed, [9, 1, 20]), (alone, [20, 10])):
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        mask = MaskSpec.from_lengths(lengths, causal=True)
        outs.append(network(Batch(row, row, places, places, mask), OPS)[0])
    torch.testing.assert_close(outs[0][10:], outs[1][:20], rtol=1e-12, atol=1e-12)

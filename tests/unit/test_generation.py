"""Generation from a cache against forwards over all tokens, for every kind of layer, position and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.cache import KVCache, Piece
from roformer_dist.model.generation import generate
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.model.sampling import Sampling
from roformer_dist.parallel.sequence_ops import single_sequence_ops

OPS = single_sequence_ops(SdpaKernel())
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 40,
    "init_std": 0.3,
}
PAIRS = 4
LONGROPE = {
    "kind": "longrope",
    "original_seq_len": 13,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "factor": 4.0,
}
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_seq_len": 13}
SCALINGS = [
    {"kind": "linear", "factor": 2.0},
    {"kind": "ntk", "factor": 2.0},
    DYNAMIC,
    {"kind": "yarn", "factor": 2.0, "original_seq_len": 8},
    LONGROPE,
    {"kind": "llama3", "factor": 2.0, "original_seq_len": 8},
]
REROPE = {"policy": {"kind": "rerope", "window": 5}}
SELF_EXTEND = {"policy": {"kind": "self_extend", "window": 5, "group": 3}}
BY_LENGTH = {
    "dynamic": {"rope": {"scaling": DYNAMIC}},
    "longrope": {"rope": {"scaling": LONGROPE}},
    "dynamic-rerope": {"rope": {"scaling": DYNAMIC, **REROPE}},
    "longrope-linear": {"rope": {"scaling": LONGROPE}, "layers": ["linear", "full"]},
    "dynamic-sliding": {"rope": {"scaling": DYNAMIC}, "layers": ["sliding", "full"], "sliding_window": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "partial": {"rope": {"partial": 0.5}},
    "half": {"rope": {"pairing": "half"}},
    "rotary-value": {"rope": {"rotary_value": True}},
    "qk-norm": {"qk_norm": True},
    "parallel": {"block": "parallel"},
    "post-norm": {
        "block": "post_norm",
        "norm": "layer_norm",
        "mlp": "gelu",
        "bias": True,
        "head_transform": True,
    },
    "rerope": {"rope": REROPE, "num_kv_heads": 2},
    "self-extend": {"rope": SELF_EXTEND},
    "sliding": {"layers": ["sliding", "full"], "sliding_window": 4, "num_kv_heads": 1},
    "window-of-one": {"layers": ["full", "sliding"], "sliding_window": 1},
    "sliding-rerope": {"layers": ["sliding"], "sliding_window": 8, "rope": REROPE},
    "linear": {"layers": ["linear", "full"], "num_kv_heads": 2},
    "linear-softmax": {"layers": ["linear"], "linear_features": "softmax"},
    "no-position": {"layers": ["full", "no_position"]},
    "sliding-t5": {
        "layers": ["sliding", "full", "no_position"],
        "sliding_window": 5,
        "position": {"kind": "relative_bias", "num_buckets": 8, "max_distance": 12},
    },
    "alibi": {"position": {"kind": "alibi"}, "num_kv_heads": 2},
    "learned": {"position": {"kind": "learned", "max_seq_len": 32}},
    "sinusoidal": {"position": {"kind": "sinusoidal"}},
    "none": {"position": {"kind": "none"}},
    **{scaling["kind"]: {"rope": {"scaling": scaling}} for scaling in SCALINGS},
    **BY_LENGTH,
}


def build(changes: dict[str, Any]) -> RoFormer:
    network = build_model(ModelConfig(**{**BASE, **changes}), masked=False, seed=3)
    if network.head.bias is not None:  # zeros would hide one that is left out
        torch.nn.init.normal_(network.head.bias, generator=torch.Generator().manual_seed(4))
    return network.double().eval()


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(48, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def full_logits(network: RoFormer, ids: Sequence[int]) -> Tensor:
    """Logits ``[tokens, vocab]`` of a forward over all tokens, without a cache."""
    row, places = torch.tensor([list(ids)]), torch.arange(len(ids))[None]
    batch = Batch(row, row, places, places, MaskSpec.from_lengths([len(ids)], causal=True))
    head: Any = network.head
    return F.linear(head(network(batch, OPS)[0]), head.weight, head.bias)


@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_that_of_forwards_over_all_tokens(name: str):
    network = build(MODELS[name])
    prompts = [tokens(9, 1), tokens(1, 2), tokens(17, 3)]
    wanted, margins = [], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            logits = full_logits(network, ids)[-1]
            best = logits.topk(2).values
            margins.append(float(best[0] - best[1]))
            ids.append(int(logits.argmax()))
        wanted.append(ids[len(prompt) :])
    # A comparison of tokens says something only where no two logits are nearly equal, and tokens differ.
    assert min(margins) > 1e-6
    assert len({token for new in wanted for token in new}) > 3
    for chunk in (None, 4):
        found = generate(network, OPS, prompts, max_new_tokens=8, prefill_chunk=chunk)
        assert [result.tokens for result in found] == wanted, chunk
    assert {result.finish for result in found} == {"length"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*BY_LENGTH, "dynamic", "longrope")])
def test_features_of_each_step_are_those_of_the_full_forward(name: str, dtype: torch.dtype):
    network = build(MODELS[name]).to(dtype)
    texts = [tokens(15, 4), tokens(9, 5)]
    cache = KVCache(network, [15, 9])
    head: Any = network.head
    found: list[list[Tensor]] = [[], []]
    # Chunks of uneven lengths, one sequence alone at times, single steps at last.
    for counts in ((6, 1), (2, 0), (1, 3), (1, 1), (1, 1), (1, 1), (3, 2)):
        parts = [(i, n, cache.lengths[i]) for i, n in enumerate(counts) if n]
        pieces = [Piece(i, torch.tensor(texts[i][at : at + n]), extent=15) for i, n, at in parts]
        hidden = cache.read(OPS, pieces)
        for (i, _, _), part in zip(parts, hidden.split([n for _, n, _ in parts])):
            found[i] += list(F.linear(head(part), head.weight, head.bias))
    for text, rows in zip(texts, found):
        assert (torch.stack(rows) - full_logits(network, text)).abs().max() <= (
            1e-12 if dtype == torch.float64 else 1e-4
        )


@pytest.mark.parametrize("name", BY_LENGTH)
def test_what_was_read_under_other_frequencies_is_read_again(name: str, monkeypatch: pytest.MonkeyPatch):
    # The prompts end just below the trained length, so that the rule changes on the way.
    network = build(MODELS[name])
    prompt = tokens(11, 7)
    ids, exact = list(prompt), []
    counts, read = [], KVCache.read
    monkeypatch.setattr(
        KVCache, "read", lambda *given: counts.append(len(given[2][0].tokens)) or read(*given)
    )
    found = generate(network, OPS, [prompt], max_new_tokens=6, sampling=Sampling(1.0, seed=5))[0].tokens
    draws = Sampling(1.0, seed=5).generator(0)
    for _ in range(6):
        exact.append(Sampling(1.0).choose(full_logits(network, ids)[-1], draws))
        ids.append(exact[-1])
    assert found == exact
    assert counts[:4] == [11, 1, 1, 14]  # up to the trained length, nothing


def test_without_reading_again_a_single_layer_is_exact_and_several_are_not():
    # Keys are kept unrotated; what they are made of is older in deeper layers.
    prompt = tokens(11, 7)
    for layers, same in ((1, True), (3, False)):
        network = build({"num_layers": layers, "rope": {"scaling": DYNAMIC}})
        cache = KVCache(network, [16])
        cache.read(OPS, [Piece(0, torch.tensor(prompt), extent=11)])
        hidden = cache.read(OPS, [Piece(0, torch.tensor([5, 6]), extent=16)])
        row, places = torch.tensor([[*prompt, 5, 6]]), torch.arange(13)[None]
        mask = MaskSpec.from_lengths([13], causal=True)
        with torch.no_grad():
            full = network(Batch(row, row, places, places, mask, extent=16), OPS)[0, -2:]
        assert (float((hidden - full).abs().max()) < 1e-12) is same
    assert len(generate(network, OPS, [prompt], max_new_tokens=6, refill=False)[0].tokens) == 6
    with pytest.raises(ValueError, match="linear layer"):
        generate(build(BY_LENGTH["longrope-linear"]), OPS, [prompt], max_new_tokens=2, refill=False)


def test_a_result_does_not_depend_on_what_stands_beside_it():
    network = build({"rope": {"scaling": DYNAMIC}})
    prompts = [tokens(n, n) for n in (3, 30, 12)]
    together = generate(network, OPS, prompts, max_new_tokens=5)
    assert together == [generate(network, OPS, [prompt], max_new_tokens=5)[0] for prompt in prompts]


def test_a_stop_token_ends_a_sequence_and_is_its_last():
    network = build({}).train()
    prompts = [tokens(5, 1), tokens(3, 2)]
    free = generate(network, OPS, prompts, max_new_tokens=8)
    stop = free[0].tokens[3]
    seen: list[tuple[int, int]] = []
    stopped = generate(
        network,
        OPS,
        prompts,
        max_new_tokens=8,
        stop_ids=[stop],
        on_token=lambda i, token: seen.append((i, token)),
    )
    for before, after, i in zip(free, stopped, range(2)):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 8
        assert after.tokens == before.tokens[:end]
        assert after.finish == ("stop" if stop in before.tokens else "length")
        assert [token for j, token in seen if j == i] == after.tokens
    assert network.training


def test_a_sliding_layer_keeps_its_window_and_a_chunk_bounds_a_forward():
    network = build({"layers": ["sliding"], "sliding_window": 4})
    cache = KVCache(network, [40])
    cache.read(OPS, [Piece(0, torch.tensor(tokens(30)), extent=30)])
    held: Any = cache._layers[0]
    assert [x.shape[0] for x in held._held[0]] == [3, 3]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in held._held[0]), "no view of all keys"
    with pytest.raises(ValueError, match="41 tokens do not fit into a cache for 40"):
        cache.read(OPS, [Piece(0, torch.tensor(tokens(11)), extent=41)])
    widths: list[int] = []
    handle = network.blocks[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    generate(network, OPS, [tokens(30), tokens(7)], max_new_tokens=2, prefill_chunk=8)
    handle.remove()
    assert widths == [8, 8, 8, 8, 5, 2]


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(0.5, seed=9)
    draws = sampling.generator(0)
    counts = torch.bincount(torch.tensor([sampling.choose(logits, draws) for _ in range(4000)]), minlength=4)
    wanted = (logits / 0.5).softmax(0)
    # Five standard errors of a binomial share.
    assert ((counts / 4000 - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-9).all()
    network = build({})
    first = [generate(network, OPS, [tokens(4)], max_new_tokens=12, sampling=sampling) for _ in range(2)]
    other = generate(network, OPS, [tokens(4)], max_new_tokens=12, sampling=Sampling(0.5, seed=10))
    assert first[0] == first[1]
    assert first[0] != other
    alike = generate(network, OPS, [tokens(4)] * 2, max_new_tokens=12, sampling=sampling)
    assert alike[0].tokens != alike[1].tokens  # each sequence has draws of its own


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    assert (Sampling(1.0, top_k=2).probabilities(logits) > 0).tolist() == [False, True, True, False]
    torch.testing.assert_close(
        Sampling(1.0, top_p=0.65).probabilities(logits), torch.tensor([0, 4 / 7, 3 / 7, 0])
    )
    assert (Sampling(1.0, top_p=0.75).probabilities(logits) > 0).tolist() == [False, True, True, True]
    assert Sampling(1.0, top_p=1e-6).probabilities(logits).tolist() == [0, 1, 0, 0]
    assert Sampling(1.0, top_k=100).probabilities(logits).allclose(logits.exp())
    # top_p counts what the temperature makes of them: 0.53 and 0.3.
    assert (Sampling(0.5, top_p=0.8).probabilities(logits) > 0).tolist() == [False, True, True, False]
    # top_p counts what top_k has left: 4/7 of it is not 0.6.
    assert (Sampling(1.0, top_k=2, top_p=0.6).probabilities(logits) > 0).sum() == 2
    assert Sampling().choose(torch.tensor([1.0, 3.0, 3.0]), torch.Generator()) == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=2, top_p=0.5)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_end_in_one_line(sampling: Sampling, broken: float) -> None:
    network = build({})
    with torch.no_grad():
        network.blocks[0].mlp.down_proj.weight[0, 0] = broken
    with pytest.raises(ValueError, match="logits are NaN or infinite") as caught:
        generate(network, OPS, [tokens(4)], max_new_tokens=2, sampling=sampling)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        sampling.choose(torch.tensor([0.0, broken, 1.0]), torch.Generator())


def test_a_network_in_training_generates_without_dropout():
    plain = generate(build({}), OPS, [tokens(4)], max_new_tokens=8)
    assert generate(build({"hidden_dropout": 0.5}).train(), OPS, [tokens(4)], max_new_tokens=8) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"top_k": 5}, "set a temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({}, {"prompts": []}, "no prompts"),
        ({}, {"prompts": [[]]}, "no tokens"),
        ({}, {"prompts": [[48]]}, "vocabulary"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens"),
        ({}, {"prefill_chunk": 0}, "prefill_chunk"),
        (
            MODELS["learned"],
            {"prompts": [[1, 2], [1, 2, 3]], "max_new_tokens": 31},
            "prompt 1 .*max_seq_len = 32",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(model: dict[str, Any], arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generate(build(model), OPS, **{"prompts": [[1, 2, 3]], "max_new_tokens": 1, **arguments})
    masked = build_model(ModelConfig(**BASE), masked=True, seed=3)
    with pytest.raises(ValueError, match="masked language model has no next token"):
        generate(masked, OPS, [[1, 2, 3]], max_new_tokens=1)

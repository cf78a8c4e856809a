"""The network: its formula, what may see what, its initial weights."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.kernels.reference import ReferenceKernel
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import RoFormer, build_model, initialise
from roformer_dist.parallel.sequence_ops import single_sequence_ops

OPS = single_sequence_ops(SdpaKernel())
LENGTHS = [5, 1, 6]


def model_config(**changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 31,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 40,
        "init_std": 0.2,
    }
    return ModelConfig(**values | changes)


def batch_of(ids: Tensor, *, causal: bool = True, lengths: list[int] = LENGTHS) -> Batch:
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand_as(ids)
    mask = MaskSpec.from_lengths(lengths * ids.shape[0], causal=causal)
    return Batch(ids, ids, positions, torch.arange(ids.numel()).reshape(ids.shape), mask)


IDS = torch.randint(0, 31, (1, 12), generator=torch.Generator().manual_seed(5))


def features(ids: Tensor, network: RoFormer | None = None, **kwargs: Any) -> Tensor:
    return (
        (network or build_model(model_config(), masked=False, seed=0))
        .eval()(batch_of(ids, **kwargs), OPS)
        .detach()
    )


def written_out(network: RoFormer, batch: Batch) -> Tensor:
    """The whole trunk for one row in float64, by the formulas of the paper and of Llama."""
    model = network.config
    w = {name: p.detach().double() for name, p in network.named_parameters()}
    seq_len, d = batch.input_ids.shape[1], model.head_size

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        if model.norm == "rms_norm":
            return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + model.norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turn(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for t, i in product(range(seq_len), range(d // 2)):
            angle = batch.position_ids[0, t].item() * model.rope.theta ** (-2 * i / d)
            a, b = (2 * i, 2 * i + 1) if model.rope.pairing == "interleaved" else (i, i + d // 2)
            out[t, :, a] = x[t, :, a] * math.cos(angle) - x[t, :, b] * math.sin(angle)
            out[t, :, b] = x[t, :, a] * math.sin(angle) + x[t, :, b] * math.cos(angle)
        return out

    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    visible = document[:, None] == document
    if batch.mask.causal:
        visible &= torch.ones(seq_len, seq_len, dtype=torch.bool).tril()

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (linear(x, f"{name}.{p}_proj").unflatten(1, (-1, d)) for p in "qkv")
        k, v = (y.repeat_interleave(model.num_heads // model.kv_heads, dim=1) for y in (turn(k), v))
        scores = torch.einsum("tnd,und->ntu", turn(q), k) / math.sqrt(d)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return linear(torch.einsum("ntu,und->tnd", weights, v).flatten(1), f"{name}.o_proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        up = linear(x, f"{name}.up_proj")
        if model.mlp == "swiglu":
            gate = linear(x, f"{name}.gate_proj")
            return linear(gate / (1 + (-gate).exp()) * up, f"{name}.down_proj")
        return linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), f"{name}.down_proj")

    x = w["embedding.weight"][batch.input_ids[0]]
    if model.block == "post_norm":
        x = norm(x, "embedding_norm")
    for i in range(model.num_layers):
        block = f"blocks.{i}"
        if model.block == "post_norm":
            x = norm(x + attention(x, f"{block}.attention"), f"{block}.attention_norm")
            x = norm(x + mlp(x, f"{block}.mlp"), f"{block}.mlp_norm")
        else:
            attended = x + attention(norm(x, f"{block}.attention_norm"), f"{block}.attention")
            beside = x if model.block == "parallel" else attended
            x = attended + mlp(norm(beside, f"{block}.mlp_norm"), f"{block}.mlp")
    return norm(x, "final_norm") if model.block != "post_norm" else x


@pytest.mark.parametrize("block", ["pre_norm", "post_norm", "parallel"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize(("causal", "pairing", "bias"), [(True, "interleaved", False), (False, "half", True)])
def test_the_trunk_is_the_formula(
    block: str, norm: str, mlp: str, causal: bool, pairing: str, bias: bool
) -> None:
    model = model_config(
        block=block, norm=norm, mlp=mlp, bias=bias, head_dim=8, rope=RopeConfig(pairing=pairing)
    )
    network = build_model(model, masked=not causal, seed=0)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:  # norms and biases start as 1 and 0, which would hide that they are left out
            generator = torch.Generator().manual_seed(len(name))
            nn.init.normal_(parameter, mean=parameter[0].item(), std=0.2, generator=generator)
    found = features(IDS, network, causal=causal)
    expected = written_out(network, batch_of(IDS, causal=causal))
    assert (found[0].double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_causal_model_does_not_see_the_future() -> None:
    whole, ids = features(IDS, lengths=[12]), IDS
    for place in (3, 8, 11):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 31
        after = features(changed, lengths=[12])
        # To the bit: no rounding may carry anything back either.
        assert torch.equal(after[:, :place], whole[:, :place])
        assert not torch.equal(after[:, place], whole[:, place])
        assert (after[:, place:] != whole[:, place:]).any(-1).all()


def test_a_masked_model_sees_both_sides() -> None:
    whole = features(IDS, causal=False, lengths=[12])
    changed = IDS.clone()
    changed[0, 11] = (IDS[0, 11] + 1) % 31
    assert (features(changed, causal=False, lengths=[12]) != whole).any(-1).all()


def test_the_type_of_a_token_adds_its_vector() -> None:
    network = build_model(model_config(type_vocab_size=3), masked=False, seed=0).eval()
    assert network.type_embedding is not None
    batch, types = batch_of(IDS), torch.arange(12)[None] % 3
    plain, typed = network(batch, OPS), network(replace(batch, token_type_ids=types), OPS)
    # The same as a vocabulary in which each pair of token and type has a vector of its own.
    pairs = (network.type_embedding.weight[:, None] + network.embedding.weight).flatten(0, 1)
    network.type_embedding, network.embedding.weight = None, nn.Parameter(pairs.detach())
    assert torch.equal(network(batch, OPS), plain)
    assert torch.equal(network(replace(batch, input_ids=IDS + 31 * types), OPS), typed)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(causal: bool) -> None:
    whole, changed = features(IDS, causal=causal), IDS.clone()
    changed[0, 5] = (IDS[0, 5] + 1) % 31  # the second document, of one token
    after = features(changed, causal=causal)
    same = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert torch.equal(after[:, same], whole[:, same])
    assert not torch.equal(after[:, 5], whole[:, 5])


def test_a_document_gives_the_same_features_alone_and_packed() -> None:
    alone = features(IDS[:, 6:], lengths=[6])
    torch.testing.assert_close(features(IDS)[:, 6:], alone, rtol=1e-5, atol=1e-6)


def test_rows_do_not_see_each_other() -> None:
    other = (IDS + 7) % 31
    both = features(torch.cat([IDS, other]))
    torch.testing.assert_close(both[1:], features(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[:1], features(IDS), rtol=1e-5, atol=1e-6)


def test_only_distances_matter_because_values_are_not_rotated() -> None:
    network, batch = build_model(model_config(), masked=False, seed=0), batch_of(IDS)
    here, there = (network(replace(batch, position_ids=batch.position_ids + n), OPS) for n in (0, 1_000_000))
    torch.testing.assert_close(there, here, rtol=0, atol=2e-5)
    stretched = network(replace(batch, position_ids=batch.position_ids * 1.5), OPS)
    assert (stretched - here).abs().max() > 1e-2


def test_the_rotation_survives_a_cast_of_the_model_to_bf16() -> None:
    network = build_model(model_config(), masked=False, seed=0).bfloat16()
    assert network.rotary.inv_freq.dtype == torch.float64
    far = replace(batch_of(IDS), position_ids=batch_of(IDS).position_ids + 1_000_000)
    # bf16 activations differ by 2^-8; bf16 angles would differ by radians.
    torch.testing.assert_close(network(far, OPS), network(batch_of(IDS), OPS), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_the_model_runs_under_the_reference_kernel_too(masked: bool) -> None:
    network = build_model(model_config(), masked=masked, seed=0)
    batch = batch_of(IDS, causal=not masked)
    dense = network(batch, single_sequence_ops(ReferenceKernel()))
    torch.testing.assert_close(network(batch, OPS), dense, rtol=1e-5, atol=1e-5)


# Initial weights


def weights(**changes: Any) -> dict[str, Tensor]:
    seed = changes.pop("seed", 0)
    network = build_model(model_config(**changes), masked=False, seed=seed)
    return {name: p.detach() for name, p in network.named_parameters()}


def test_initial_weights_do_not_depend_on_order_or_on_the_global_generator() -> None:
    first = weights()
    torch.manual_seed(1234)
    network = RoFormer(model_config(), masked=False, seed=0)
    # The same modules, found in another order.
    network.blocks = nn.ModuleList(network.blocks)
    network._modules = dict(reversed(network._modules.items()))
    initialise(network, 0)
    second = dict(network.named_parameters())
    assert first.keys() == {name.replace("head.projection", "embedding") for name in second}
    for name in first.keys() & second.keys():
        assert torch.equal(first[name], second[name]), name


def test_other_layers_do_not_change_a_weight() -> None:
    # Standard deviations of residual projections depend on the number of layers; the draws do not.
    two, three = weights(), weights(num_layers=3)
    assert torch.equal(two["blocks.1.attention.q_proj.weight"], three["blocks.1.attention.q_proj.weight"])


def test_seeds_names_and_layers_draw_differently() -> None:
    a, b = weights(seed=0), weights(seed=1)
    matrices = [name for name, p in a.items() if p.ndim > 1]
    assert all(not torch.equal(a[name], b[name]) for name in matrices)
    assert not torch.equal(a["blocks.0.attention.k_proj.weight"], a["blocks.0.attention.v_proj.weight"])
    assert not torch.equal(a["blocks.0.mlp.up_proj.weight"], a["blocks.1.mlp.up_proj.weight"])


def test_initial_distributions() -> None:
    found = weights(
        hidden_size=64, intermediate_size=128, num_layers=8, init_std=0.05, bias=True, norm="layer_norm"
    )
    for name, parameter in found.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
        else:
            # Projections into the residual stream are smaller by sqrt(2 * 8 layers) = 4.
            std = 0.0125 if "o_proj" in name or "down_proj" in name else 0.05
            count = parameter.numel()
            assert abs(parameter.std().item() - std) <= 5 * std / math.sqrt(2 * count), name
            assert abs(parameter.mean().item()) <= 5 * std / math.sqrt(count), name


def test_parameter_counts_by_hand() -> None:
    def count(*, masked: bool = False, **changes: Any) -> int:
        network = build_model(model_config(**changes), masked=masked, seed=0)
        return sum(p.numel() for p in network.parameters())

    # 24 wide, 4 query and 2 key heads of 6, 40 inside, 31 words, 2 layers.
    attention = 24 * 24 + 2 * 24 * 12 + 24 * 24
    base = 31 * 24 + 2 * (attention + 3 * 24 * 40 + 2 * 24) + 24
    assert count() == base
    assert count(tie_embeddings=False) == base + 31 * 24
    # BERT's head: a transform with bias, its norm, a bias for every word.
    assert count(masked=True) == base + 24 * 24 + 24 + 24 + 31
    assert count(mlp="gelu") == base - 2 * 24 * 40
    assert count(bias=True) == base + 2 * ((24 + 12 + 12 + 24) + (40 + 40 + 24))
    assert count(attention_bias="qkv") == base + 2 * (24 + 12 + 12)
    assert count(block="post_norm", norm="layer_norm") == base + 5 * 24


def test_tied_weights_are_one_tensor_and_gather_both_gradients() -> None:
    tied = build_model(model_config(), masked=False, seed=0)
    assert tied.head.weight is tied.embedding.weight
    untied = build_model(model_config(tie_embeddings=False), masked=False, seed=0)
    assert untied.head.weight is not untied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    untied.head.projection.weight.data.copy_(untied.embedding.weight)
    for network in (tied, untied):
        F.cross_entropy(network(batch_of(IDS), OPS)[0] @ network.head.weight.T, IDS[0]).backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["pre_norm", "post_norm", "parallel"])
def test_dropout_acts_at_every_site_and_only_in_training(block: str) -> None:
    model = model_config(hidden_dropout=0.5, block=block)
    network, batch = build_model(model, masked=False, seed=0), batch_of(IDS)
    plain = build_model(model_config(block=block), masked=False, seed=0)(batch, OPS)
    assert torch.equal(network.eval()(batch, OPS), plain)
    assert not torch.equal(network.train()(batch, OPS), plain)
    sites = [network.embedding_dropout]
    sites += [site for block in network.blocks for site in (block.attention_dropout, block.mlp_dropout)]
    assert len({site.key for site in sites}) == 5
    # Leaving out any one of them changes the outcome.
    outcome = network(batch, OPS)
    for site in sites:
        site.probability = 0.0
        assert not torch.equal(network(batch, OPS), outcome)
        site.probability = 0.5

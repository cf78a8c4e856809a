"""Checkpointing, offload and tiles change memory and work, and no gradient; counted, not timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config import ModelConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model import memory
from roformer_dist.model.blocks import Block
from roformer_dist.model.memory import ActivationMemory
from roformer_dist.model.roformer import RoFormer, build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops

SEQ_LEN, VOCAB, LAYERS = 26, 31, 2
STYLES: dict[str, dict[str, Any]] = {
    "modern": {"num_kv_heads": 2},
    "paper": {"block": "post_norm", "norm": "layer_norm", "mlp": "gelu", "bias": True},
}
OPTIONS = [
    (ActivationMemory(checkpointing, offload), tile)
    for checkpointing, offload, tile in product(("none", "full", "selective"), (False, True), (None, 7))
    if not (offload and checkpointing == "none") and (checkpointing, tile) != ("none", None)
]


def option_id(option: tuple[ActivationMemory, int | None]) -> str:
    how, tile = option
    return f"{how.checkpointing}{'-offload' * how.offload}{f'-tiles{tile}' if tile else ''}"


@dataclass
class CountingKernel(SdpaKernel):
    """The CPU kernel, counting its calls."""

    calls: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls["forward"] += 1
        return super().forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls["backward"] += 1
        return super().backward(*args)


def make_network(style: str, how: ActivationMemory, tile: int | None, num_layers: int = LAYERS) -> RoFormer:
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        intermediate_size=40,
        hidden_dropout=0.1,
        init_std=0.1,
        **STYLES[style],
    )
    network = build_model(model, masked=False, seed=0)
    network.memory = how
    for block in network.blocks:
        assert isinstance(block, Block)
        block.mlp.tile_tokens = tile
    return network


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, VOCAB, (2, SEQ_LEN), generator=generator) for _ in range(2))
    lengths = [7, 19, 1, 25]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, SEQ_LEN)
    counters = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    return Batch(ids, labels, positions, counters, MaskSpec.from_lengths(lengths, causal=True))


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    total = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, want in expected.items():
        error = float((found[name] - want).norm())
        assert error <= 1e-5 * max(float(want.norm()), 1e-3 * total), name


def gradients_of(network: RoFormer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def run_alone(style: str, how: ActivationMemory, tile: int | None) -> tuple[float, dict[str, Tensor], Any]:
    network, kernel = make_network(style, how, tile), CountingKernel()
    loss, _ = SummedLoss(network).train()(make_batch(), single_sequence_ops(kernel))
    loss.backward()
    return float(loss.detach()), gradients_of(network), kernel.calls


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_loss_and_every_gradient_are_those_of_the_plain_run(
    option: tuple[ActivationMemory, int | None], style: str
) -> None:
    expected_loss, expected, _ = run_alone(style, ActivationMemory(), None)
    loss, found, calls = run_alone(style, *option)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    assert_equal_gradients(found, expected)
    forwards = 2 if option[0].checkpointing == "full" else 1
    assert calls == {"forward": forwards * LAYERS, "backward": LAYERS}


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_what_is_kept_waits_in_host_memory(checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, moved = memory.save_on_cpu, memory._to_host
    blocks: list[Any] = []
    tensors: list[Tensor] = []
    monkeypatch.setattr(memory, "save_on_cpu", lambda **given: blocks.append(given) or saved(**given))
    monkeypatch.setattr(memory, "_to_host", lambda x: tensors.append(x) or moved(x))
    for offload in (False, True):
        run_alone("modern", ActivationMemory(checkpointing, offload), None)
        assert len(blocks) == LAYERS * offload  # what the checkpoint keeps of each block
        assert bool(tensors) == (offload and checkpointing == "selective")  # and of its attention


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_selective_repeats_no_message_on_two_ranks(checkpointing: Any) -> None:
    _, expected, _ = run_alone("modern", ActivationMemory(), None)

    def rank(comm: Any) -> tuple[dict[str, Tensor], int, Any]:
        kernel = CountingKernel()
        ops, layout = sequence_ops(kernel, build_mesh(comm, ulysses_size=2))
        messages = 0
        send = comm.all_to_all

        def counted(*chunks: Any) -> Any:
            nonlocal messages
            messages += 1
            return send(*chunks)

        comm.all_to_all = counted
        network = make_network("modern", ActivationMemory(checkpointing), None)
        loss, _ = SummedLoss(network).train()(layout.slice(make_batch(), comm.rank), ops)
        loss.backward()
        return gradients_of(network), messages, kernel.calls

    results = run_in_process(2, rank)
    summed = {name: sum(grads[name] for grads, _, _ in results) for name in expected}
    assert_equal_gradients(summed, expected)  # pyright: ignore[reportArgumentType]
    # Forward: q, k and v there, out back; backward: out there, three gradients back; full: the forward twice.
    wanted = {"none": 8, "full": 12, "selective": 8}[checkpointing]
    assert [messages for _, messages, _ in results] == [wanted * LAYERS] * 2
    forwards = 2 if checkpointing == "full" else 1
    assert all(calls["forward"] == forwards * LAYERS for _, _, calls in results)


@pytest.mark.parametrize(
    ("checkpointing", "bytes_per_token"),
    # hidden_size 32, 4 heads of 8, float32: a block's input; and attention's output and lse.
    [("full", 4 * 32), ("selective", 4 * 32 + 4 * 4 * 8 + 4 * 4)],
)
def test_what_a_block_keeps(
    checkpointing: Any, bytes_per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, Tensor] = {}
    keep = memory._Call.keep

    def noted(call: Any, tensor: Tensor) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return keep(call, tensor)

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    monkeypatch.setattr(memory._Call, "keep", noted)

    def total(num_layers: int) -> int:
        kept.clear()
        network = make_network("modern", ActivationMemory(checkpointing), None, num_layers)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = SummedLoss(network).train()(make_batch(), single_sequence_ops(SdpaKernel()))
        assert loss.requires_grad
        parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)

    assert total(3) - total(2) == 2 * SEQ_LEN * bytes_per_token

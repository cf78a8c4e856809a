"""Guards on counted work: messages and bytes of a step, never time.

P ranks, R rows, S local tokens, N query heads, M key/value heads, D head_dim. What Ulysses sends in one
layer, as bytes that one rank puts into its messages (1/P of them stay where they are):

    forward   q, out                   R S N D * itemsize each
              k, v                     R S M D * itemsize each
    backward  dout, dq                 R S N D * itemsize each
              dk, dv                   R S M D * itemsize each
"""

from __future__ import annotations

import pytest
import torch

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.config.model import ModelConfig
from roformer_dist.kernels.sdpa import SdpaKernel
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.counting import CountingComm
from roformer_dist.parallel.in_process import run_in_process
from roformer_dist.parallel.mesh import build_mesh
from roformer_dist.parallel.sequence_ops import sequence_ops

LAYERS, VOCAB = 2, 31


Messages = list[tuple[str, int]]


def step(
    sp_size: int, model: ModelConfig, rows: int, seq_len: int, dtype: torch.dtype
) -> list[list[Messages]]:
    """For every rank the messages of one forward and of its backward."""
    ids = torch.arange(rows * seq_len).reshape(rows, seq_len)
    positions = torch.arange(seq_len).expand(rows, seq_len)
    # Two documents a row: how rows are packed must not change what is sent.
    mask = MaskSpec.from_lengths([seq_len // 3, seq_len - seq_len // 3] * rows, causal=True)
    batch = Batch(ids % VOCAB, (ids + 1) % VOCAB, positions, ids, mask)

    def rank(comm: Comm) -> list[Messages]:
        counting = CountingComm(comm)
        ops, layout = sequence_ops(SdpaKernel(), build_mesh(counting, ulysses_size=comm.size))
        objective = SummedLoss(build_model(model, masked=False, seed=0)).to(dtype)
        nll_sum, _ = objective(layout.slice(batch, comm.rank), ops)
        messages = counting.messages
        count = len(messages)
        nll_sum.backward()
        noted = [(message.verb, message.bytes) for message in messages]
        return [noted[:count], noted[count:]]

    return run_in_process(sp_size, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2)])
@pytest.mark.parametrize(("sp_size", "rows", "seq_len"), [(2, 1, 24), (2, 3, 25), (1, 2, 24)])
def test_a_layer_sends_each_tensor_as_a_message_of_the_size_of_its_heads(
    sp_size: int, rows: int, seq_len: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=LAYERS,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=6,
        intermediate_size=16,
    )
    local_seq_len = -(-seq_len // sp_size)
    per_head = rows * local_seq_len * 6 * dtype.itemsize
    out, key = (("all_to_all", count * per_head) for count in (heads, kv_heads))
    layers = LAYERS if sp_size > 1 else 0  # one process sends nothing at all
    for forward, backward in step(sp_size, model, rows, seq_len, dtype):
        assert forward == [out, key, key, out] * layers
        assert backward == [out, out, key, key] * layers


def test_evaluation_sends_no_gradients() -> None:
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=LAYERS, num_heads=4, intermediate_size=16
    )
    ids = torch.arange(24)[None] % VOCAB
    batch = Batch(ids, ids, ids, ids, MaskSpec.from_lengths([24], causal=True))

    def rank(comm: Comm) -> int:
        counting = CountingComm(comm)
        ops, layout = sequence_ops(SdpaKernel(), build_mesh(counting, ulysses_size=comm.size))
        with torch.no_grad():
            SummedLoss(build_model(model, masked=False, seed=0))(layout.slice(batch, comm.rank), ops)
        return len(counting.messages)

    assert run_in_process(2, rank) == [4 * LAYERS] * 2

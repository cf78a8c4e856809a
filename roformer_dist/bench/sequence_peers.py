"""DeepSpeed's two forms of Ulysses as contenders. Importing it needs deepspeed and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed.comm
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.bench.ours import model_config
from roformer_dist.bench.peers import llama
from roformer_dist.bench.sequence import PEERS
from roformer_dist.bench.sequence_child import Share, run_ours
from roformer_dist.bench.train import Job
from roformer_dist.bench.train_child import DTYPES
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.roformer import build_model
from roformer_dist.parallel.attention import ParallelSequenceOps
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.layout import ContiguousLayout
from roformer_dist.parallel.sequence_ops import single_sequence_ops

# Our parameters' names as those of Hugging Face's Llama.
LLAMA_NAMES = (
    ("embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".attention.", ".self_attn."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    ("final_norm.", "model.norm."),
    ("head.projection.", "lm_head."),
)


class _DistributedOps(ParallelSequenceOps):
    """Our attention on a rank's heads, with DeepSpeed's all-to-all around it."""

    def __init__(self, world: Comm) -> None:
        kernel, _ = choose_kernel("auto", "cpu")
        super().__init__(kernel, single_sequence_ops(kernel).scheme, world)
        # Any: DeepSpeed declares a class of its own for what torch returns.
        group: Any = deepspeed.comm.new_group(list(range(world.size)))
        # Our tensors are [rows, tokens, heads, head_dim].
        self._distributed = DistributedAttention(_Local(kernel), group, scatter_idx=2, gather_idx=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        """See SequenceOps."""
        return self._distributed(q, k, v, 0, None, mask, softmax_scale)


class _Local(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self._ops = single_sequence_ops(kernel)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, softmax_scale: float) -> Tensor:
        return self._ops.attend(q, k, v, mask, softmax_scale)


def _distributed_attention(job: Job, batch: Batch, world: Comm) -> tuple[nn.Module, Share]:
    return run_ours(job, batch, _DistributedOps(world), ContiguousLayout(world.size), world)


def _ulysses_hf(job: Job, batch: Batch, world: Comm) -> tuple[nn.Module, Share]:
    network: Any = llama(job)
    _copy_weights(job, network)
    UlyssesSPAttentionHF.register_with_transformers(
        network,
        "sdpa",
        world.size,
        micro_batch_size=1,
        seq_length=job.length,
        seq_length_is_variable=False,
    )
    targets = torch.tensor(int((batch.labels >= 0).sum()))
    layout = ContiguousLayout(world.size)

    def run() -> float:
        local = layout.slice(batch, world.rank)
        logits = network(input_ids=local.input_ids, position_ids=local.position_ids).logits
        loss = network.loss_function(
            logits=logits,
            labels=None,
            shift_labels=local.labels,
            vocab_size=job.shape.vocab_size,
            num_items_in_batch=targets,
        )
        loss.backward()
        return loss.item()

    return network, run


def _copy_weights(job: Job, network: nn.Module) -> None:
    """Give a Llama the weights that our decoder starts with."""
    ours = build_model(model_config(job), masked=False, seed=job.seed).to(DTYPES[job.dtype])
    theirs = network.state_dict()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            for old, new in LLAMA_NAMES:
                name = name.replace(old, new)
            theirs[name].copy_(weight)


BUILDERS: dict[str, Callable[[Job, Batch, Comm], tuple[nn.Module, Share]]] = {
    PEERS["distributed-attention"]: _distributed_attention,
    PEERS["ulysses-hf"]: _ulysses_hf,
}

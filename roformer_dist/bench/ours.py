"""Ours as a contender: the network and the loss that training uses, without an engine around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from roformer_dist.batch import Batch, MaskSpec
from roformer_dist.bench.train import Job
from roformer_dist.bench.work import Work
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.config.training import TrainConfig
from roformer_dist.kernels.attention import choose_kernel
from roformer_dist.model.options import apply_options
from roformer_dist.model.roformer import build_model
from roformer_dist.objectives import SummedLoss
from roformer_dist.parallel.sequence_ops import single_sequence_ops


def build(job: Job, work: Work) -> tuple[nn.Module, Callable[[], float]]:
    """The network in the job's dtype, and one forward and backward."""
    masked = job.workload == "masked"
    network = build_model(model_config(job), masked=masked, seed=job.seed)
    train = TrainConfig(
        seq_len=job.length,
        tokens_per_step=job.length,
        num_steps=1,
        activation_checkpointing=job.checkpointing,  # pyright: ignore[reportArgumentType]
        mlp_tile_tokens=job.mlp_tile_tokens,
    )
    apply_options(network, train, torch.device("cpu"))
    loss = SummedLoss(network.to(torch.bfloat16 if job.dtype == "bf16" else torch.float32))
    ops = single_sequence_ops(choose_kernel("auto", "cpu")[0])
    batch = Batch(
        work.input_ids,
        work.labels,
        work.position_ids,
        torch.arange(job.length)[None],
        MaskSpec.from_lengths(list(work.documents), causal=not masked),
    )

    def step() -> float:
        total, targets = loss(batch, ops)
        mean = total / targets
        mean.backward()
        return mean.item()

    return loss.train(), step


def model_config(job: Job) -> ModelConfig:
    """The paper's encoder, as Hugging Face's RoFormer is, or a decoder as its Llama is."""
    shape = job.shape
    if job.workload == "masked":
        return ModelConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            intermediate_size=shape.gelu_size,
            block="post_norm",
            norm="layer_norm",
            norm_eps=1e-12,
            mlp="gelu",
            bias=True,
            tie_embeddings=True,
            rope=RopeConfig(pairing="interleaved"),
        )
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        intermediate_size=shape.swiglu_size,
        norm_eps=1e-6,
        tie_embeddings=False,
        rope=RopeConfig(pairing="half"),
    )

"""Hugging Face models as contenders, of the same size and on the same tokens. Importing it needs transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (  # pyright: ignore[reportMissingImports]
    LlamaConfig,
    LlamaForCausalLM,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

from roformer_dist.batch import IGNORE_INDEX
from roformer_dist.bench.gpu import GpuModel
from roformer_dist.bench.train import Job
from roformer_dist.bench.work import Work

Step = Callable[[], float]


def _roformer(job: Job, work: Work) -> tuple[nn.Module, Step]:
    shape = job.shape
    config = RoFormerConfig(
        vocab_size=shape.vocab_size,
        embedding_size=shape.hidden_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.gelu_size,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        # Its table of positions; it has no more.
        max_position_embeddings=job.length,
        layer_norm_eps=1e-12,
        rotary_value=False,
    )
    network = _ready(RoFormerForMaskedLM(config), job)

    def step() -> float:
        return _backward(network(input_ids=work.input_ids, labels=work.labels).loss)

    return network, step


def build_llama(model: GpuModel, tokens: int) -> LlamaForCausalLM:
    """Llama of the size of ``model`` with SDPA, in float32, for rows of up to ``tokens``."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=tokens,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def llama(job: Job) -> nn.Module:
    """Hugging Face's Llama of the size of our decoder, with PyTorch's attention."""
    shape = job.shape
    model = GpuModel(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        intermediate_size=shape.swiglu_size,
    )
    return _ready(build_llama(model, job.length), job)


def _llama_one_document(job: Job, work: Work) -> tuple[nn.Module, Step]:
    network = llama(job)

    def step() -> float:
        # It shifts labels itself, and skips the mask where nothing is hidden but the future.
        return _backward(network(input_ids=work.input_ids, labels=work.input_ids).loss)

    return network, step


def _llama_dense_mask(job: Job, work: Work) -> tuple[nn.Module, Step]:
    network = llama(job)
    labels = work.input_ids.masked_fill(work.position_ids == 0, IGNORE_INDEX)

    def step() -> float:
        # Positions that start again make it build a mask of S x S for the packed documents.
        inputs = {"input_ids": work.input_ids, "position_ids": work.position_ids}
        return _backward(network(**inputs, labels=labels).loss)

    return network, step


def _llama_call_per_document(job: Job, work: Work) -> tuple[nn.Module, Step]:
    network = llama(job)
    pieces = work.input_ids.split(list(work.documents), dim=1)

    def step() -> float:
        total = 0.0
        for piece in pieces:
            # Each call's mean has its document's share; its activations are freed before the next.
            share = (piece.shape[1] - 1) / work.targets
            total += _backward(network(input_ids=piece, labels=piece).loss * share)
        return total

    return network, step


def _ready(network: Any, job: Job) -> nn.Module:
    return network.to(torch.bfloat16 if job.dtype == "bf16" else torch.float32).train()


def _backward(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


BUILDERS: dict[str, Callable[[Job, Work], tuple[nn.Module, Step]]] = {
    "hf-roformer": _roformer,
    "hf-llama": _llama_one_document,
    "hf-llama dense mask": _llama_dense_mask,
    "hf-llama by document": _llama_call_per_document,
}

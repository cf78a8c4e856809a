"""RoFormer: the paper's encoder, as masked or causal language model or classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from roformer_dist.config.data import ClassificationObjective, Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.interop.family import SIZES, Constant, Description, Pairing, Weight, unexpressed
from roformer_dist.interop.rope import check_table, read_rope, write_rope
from roformer_dist.interop.settings import HuggingFaceError, Settings
from roformer_dist.model.rotary import Rotary

TABLE = "roformer.encoder.embed_positions.weight"
KINDS = {
    "RoFormerForMaskedLM": "masked",
    "RoFormerForCausalLM": "causal",
    "RoFormerForSequenceClassification": "classification",
}
# Of BERT's configurations, from which old RoFormer ones were made; RoFormer has no pooler.
_LEGACY = [
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
]


class RoFormerFamily:
    """See Family. cos and sin are a saved table, so any fixed frequencies can be expressed."""

    name = "RoFormer"
    model_type = "roformer"
    pairing: Pairing = "interleaved"
    ignored = r"roformer\.embeddings\.position_ids$"

    def read(
        self, settings: Settings, architecture: str, num_labels: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See Family."""
        kind = KINDS[architecture]
        if settings.flag("is_decoder") != (kind == "causal"):
            wanted = "true" if kind == "causal" else "false"
            raise HuggingFaceError(
                f"{settings.source}: is_decoder must be {wanted} for {architecture}: it decides what a token sees"
            )
        settings.require("add_cross_attention", False)
        settings.require("is_encoder_decoder", False)
        settings.require("hidden_act", "gelu")
        for key in _LEGACY:
            settings.take_or(key, None)
        hidden_size, embedding_size = settings.take("hidden_size"), settings.take("embedding_size")
        trained = settings.peek("max_position_embeddings")
        # transformers ignores both keys; what they say is compared with the table.
        parameters = settings.take_or("rope_parameters", None) or {}
        parameters = {"rope_theta": settings.take_or("rope_theta", 10000.0), **parameters}
        rope = read_rope(parameters, trained=trained, source=settings.source)
        model = {
            "vocab_size": settings.take("vocab_size"),
            "type_vocab_size": settings.take("type_vocab_size"),
            "hidden_size": hidden_size,
            "num_layers": settings.take("num_hidden_layers"),
            "num_heads": settings.take("num_attention_heads"),
            "intermediate_size": settings.take("intermediate_size"),
            "block": "post_norm",
            "norm": "layer_norm",
            "norm_eps": settings.number("layer_norm_eps"),
            "mlp": "gelu",
            "bias": True,
            "tie_embeddings": settings.flag("tie_word_embeddings"),
            "hidden_dropout": settings.number("hidden_dropout_prob"),
            "init_std": settings.number("initializer_range"),
            "rope": {**rope, "pairing": "interleaved", "rotary_value": settings.flag("rotary_value")},
        }
        if embedding_size != hidden_size:
            model["embedding_size"] = embedding_size
        if kind == "causal":
            model["head_transform"] = True
        objective: dict[str, Any] = {"kind": kind}
        if kind == "classification":
            objective["num_labels"] = num_labels
            model["tie_embeddings"] = True  # there is no output layer over the vocabulary
        settings.note_attention_dropout("attention_probs_dropout_prob")
        return model, objective

    def write(self, description: Description) -> dict[str, Any]:
        """See Family."""
        model, objective = description.model, description.objective
        (architecture,) = (name for name, kind in KINDS.items() if kind == objective.kind)
        values: dict[str, Any] = {
            "architectures": [architecture],
            "is_decoder": objective.kind == "causal",
            "vocab_size": model.vocab_size,
            "type_vocab_size": max(1, model.type_vocab_size),
            "hidden_size": model.hidden_size,
            "embedding_size": model.embedding_width,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.intermediate_size,
            "layer_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "hidden_dropout_prob": model.hidden_dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "initializer_range": model.init_std,
            "rotary_value": model.rope.rotary_value,
            "max_position_embeddings": description.max_position_embeddings,
        }
        if isinstance(objective, ClassificationObjective):
            values["num_labels"] = objective.num_labels
        rope = write_rope(model.rope, model.head_size, description.max_position_embeddings)
        if rope != {"rope_theta": 10000.0, "rope_type": "default"}:
            values["rope_parameters"] = rope  # for our own import; transformers reads the table
        return values

    def mismatches(self, model: ModelConfig, objective: Objective) -> list[str]:
        """See Family."""
        wanted: dict[str, tuple[object, ...]] = {
            "block": ("post_norm",),
            "norm": ("layer_norm",),
            "mlp": ("gelu",),
            "bias": (True,),
            "biased_projections": ("all",),
            "qk_norm": (False,),
            "kv_heads": (model.num_heads,),
            "head_size": (model.hidden_size / model.num_heads,),
        }
        free = SIZES | {
            "type_vocab_size",
            "embedding_size",
            "head_transform",
            "attention_bias",
            "num_kv_heads",
            "head_dim",
            "rope",
        }
        clauses = unexpressed(model, wanted, free)
        if objective.kind != "classification" and not model.transforms_head(
            masked=objective.kind == "masked"
        ):
            clauses.append("model.head_transform = false")
        if isinstance(objective, ClassificationObjective) and objective.pooling != "first":
            clauses.append(f"objective.pooling = {objective.pooling!r} and not 'first'")
        if model.rope.rotary_value and model.rope.pairing == "half":
            clauses.append("model.rope.pairing = 'half' with rotary_value")
        table = check_table(model.rope)
        return clauses + ([table] if table else [])

    def weights(self, model: ModelConfig, objective: Objective) -> list[Weight]:
        """See Family."""
        embeddings = "roformer.embeddings"
        pairs = {
            f"{embeddings}.word_embeddings.weight": "embedding.weight",
            **_norm(f"{embeddings}.LayerNorm", "embedding_norm"),
        }
        if model.type_vocab_size:
            pairs[f"{embeddings}.token_type_embeddings.weight"] = "type_embedding.weight"
        if model.embedding_width != model.hidden_size:
            pairs |= _linear("roformer.embeddings_project", "embedding_projection")
        for i in range(model.num_layers):
            theirs, ours = f"roformer.encoder.layer.{i}", f"blocks.{i}"
            for a, b in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
                pairs |= _linear(f"{theirs}.attention.self.{a}", f"{ours}.attention.{b}")
            pairs |= _linear(f"{theirs}.attention.output.dense", f"{ours}.attention.o_proj")
            pairs |= _norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
            pairs |= _linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up_proj")
            pairs |= _linear(f"{theirs}.output.dense", f"{ours}.mlp.down_proj")
            pairs |= _norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
        pairs |= _head(model, objective)
        return [Weight(theirs, (ours,)) for theirs, ours in pairs.items()]

    def constants(self, model: ModelConfig, max_position_embeddings: int) -> Mapping[str, Constant]:
        """sin in the first half of each row, cos in the second; and a type embedding of zeros where we have none."""

        def table() -> Tensor:
            phases = Rotary(model.rope, model.head_size).phases(torch.arange(max_position_embeddings)[None])
            return torch.cat([phases.sin[0], phases.cos[0]], dim=-1)

        tables = {TABLE: Constant((max_position_embeddings, model.head_size), table)}
        if not model.type_vocab_size:
            name, shape = "roformer.embeddings.token_type_embeddings.weight", (1, model.embedding_width)
            tables[name] = Constant(shape, lambda: torch.zeros(shape))
        return tables

    def duplicates(self, model: ModelConfig) -> Mapping[str, str]:
        """See Family."""
        if not model.tie_embeddings:
            return {}
        return {
            "cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def unused(self, model: ModelConfig, objective: Objective) -> Mapping[str, str]:
        """The head's own bias, beside the output layer's when they are not tied."""
        if model.tie_embeddings or objective.kind == "classification":
            return {}
        return {"cls.predictions.bias": "cls.predictions.decoder.bias"}


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


_norm = _linear  # a LayerNorm has the same two


def _head(model: ModelConfig, objective: Objective) -> dict[str, str]:
    if isinstance(objective, ClassificationObjective):
        return _linear("classifier.dense", "head.dense") | _linear("classifier.out_proj", "head.projection")
    pairs = _linear("cls.predictions.transform.dense", "head.transform")
    pairs |= _norm("cls.predictions.transform.LayerNorm", "head.transform_norm")
    if model.tie_embeddings:
        return pairs | {"cls.predictions.bias": "head.projection.bias"}
    return pairs | _linear("cls.predictions.decoder", "head.projection")

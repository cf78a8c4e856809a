"""Llama and its kin: Qwen2 (biases on queries, keys and values) and Qwen3 (QK-norm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.interop.family import SIZES, Constant, Description, Pairing, Weight, unexpressed
from roformer_dist.interop.rope import read_rope, write_rope
from roformer_dist.interop.settings import Settings


class LlamaFamily:
    """See Family.

    Args:
        name, model_type: ``Llama`` and ``llama``, and so on.
        qk_norm: whether queries and keys are normalised.
        attention_bias: which projections of attention may carry biases.
        mlp_bias: whether there is a key for biases in the MLP.
        free_head_dim: whether head_dim may differ from hidden_size / num_heads.
    """

    pairing: Pairing = "half"
    ignored = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"

    def __init__(
        self,
        name: str,
        model_type: str,
        *,
        qk_norm: bool = False,
        attention_bias: tuple[str, ...] = ("none", "all"),
        mlp_bias: bool = False,
        free_head_dim: bool = True,
    ) -> None:
        self.name = name
        self.model_type = model_type
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.free_head_dim = free_head_dim

    def read(
        self, settings: Settings, architecture: str, num_labels: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See Family."""
        del architecture, num_labels
        settings.require("hidden_act", "silu")
        settings.require("pretraining_tp", 1)
        settings.require("is_encoder_decoder", False)
        if self.model_type != "llama":
            settings.require("use_sliding_window", False)
            settings.require("layer_types", ["full_attention"] * settings.peek("num_hidden_layers"), None)
            for key in ("sliding_window", "max_window_layers"):  # read only with use_sliding_window
                settings.take_or(key, None)
        trained = settings.peek("max_position_embeddings")
        rope = read_rope(settings.take("rope_parameters"), trained=trained, source=settings.source)
        # transformers would turn all dimensions or fail: it has no partial rotation here.
        settings.check(rope["partial"] == 1.0, "rope_parameters.partial_rotary_factor", rope["partial"])
        if len(self.attention_bias) == 1:
            attention_bias = self.attention_bias[0]
        else:
            attention_bias = "all" if settings.flag("attention_bias") else "none"
        hidden_size, heads = settings.take("hidden_size"), settings.take("num_attention_heads")
        model = {
            "vocab_size": settings.take("vocab_size"),
            "hidden_size": hidden_size,
            "num_layers": settings.take("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": settings.take("num_key_value_heads"),
            "head_dim": settings.take_or("head_dim", None) or hidden_size // heads,
            "intermediate_size": settings.take("intermediate_size"),
            "norm_eps": settings.number("rms_norm_eps"),
            "bias": settings.flag("mlp_bias") if self.mlp_bias else False,
            "attention_bias": attention_bias,
            "qk_norm": self.qk_norm,
            "tie_embeddings": settings.flag("tie_word_embeddings"),
            "init_std": settings.number("initializer_range"),
            "rope": {**rope, "pairing": "half"},
        }
        settings.note_attention_dropout("attention_dropout")
        return model, {"kind": "causal"}

    def write(self, description: Description) -> dict[str, Any]:
        """See Family."""
        model, trained = description.model, description.max_position_embeddings
        values: dict[str, Any] = {
            "architectures": [f"{self.name}ForCausalLM"],
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.kv_heads,
            "intermediate_size": model.intermediate_size,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "initializer_range": model.init_std,
            "max_position_embeddings": trained,
            "rope_parameters": write_rope(model.rope, model.head_size, trained),
        }
        if self.free_head_dim:
            values["head_dim"] = model.head_size
        if len(self.attention_bias) > 1:
            values["attention_bias"] = model.biased_projections == "all"
        if self.mlp_bias:
            values["mlp_bias"] = model.bias
        return values

    def mismatches(self, model: ModelConfig, objective: Objective) -> list[str]:
        """See Family."""
        even = model.hidden_size / model.num_heads
        wanted: dict[str, tuple[object, ...]] = {
            "block": ("pre_norm",),
            "norm": ("rms_norm",),
            "mlp": ("swiglu",),
            "bias": (False, True) if self.mlp_bias else (False,),
            "biased_projections": self.attention_bias,
            "qk_norm": (self.qk_norm,),
            "embedding_width": (model.hidden_size,),
            "rope.partial": (1.0,),
            "rope.rotary_value": (False,),
        }
        if not self.free_head_dim:
            wanted["head_size"] = (even,)
        free = SIZES | {"num_kv_heads", "head_dim", "attention_bias", "embedding_size", "head_transform"}
        clauses = unexpressed(model, wanted, free)
        if self.model_type == "llama" and even != int(even):
            clauses.append(
                f"model.hidden_size = {model.hidden_size} is not a multiple of num_heads = {model.num_heads}"
            )
        return clauses + causal_only(model, objective)

    def weights(self, model: ModelConfig, objective: Objective) -> list[Weight]:
        """See Family."""
        del objective
        pairs = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "final_norm.weight"}
        projections = {"none": "", "qkv": "qkv", "all": "qkvo"}[model.biased_projections]
        for i in range(model.num_layers):
            theirs, ours = f"model.layers.{i}", f"blocks.{i}"
            pairs[f"{theirs}.input_layernorm.weight"] = f"{ours}.attention_norm.weight"
            pairs[f"{theirs}.post_attention_layernorm.weight"] = f"{ours}.mlp_norm.weight"
            for x in "qkvo":
                pairs[f"{theirs}.self_attn.{x}_proj.weight"] = f"{ours}.attention.{x}_proj.weight"
            for x in projections:
                pairs[f"{theirs}.self_attn.{x}_proj.bias"] = f"{ours}.attention.{x}_proj.bias"
            for x in "qk" if self.qk_norm else "":
                pairs[f"{theirs}.self_attn.{x}_norm.weight"] = f"{ours}.attention.{x}_norm.weight"
            for x in ("gate", "up", "down"):
                for part in ("weight", "bias") if model.bias else ("weight",):
                    pairs[f"{theirs}.mlp.{x}_proj.{part}"] = f"{ours}.mlp.{x}_proj.{part}"
        if not model.tie_embeddings:
            pairs["lm_head.weight"] = "head.projection.weight"
        return [Weight(theirs, (ours,)) for theirs, ours in pairs.items()]

    def constants(self, model: ModelConfig, max_position_embeddings: int) -> Mapping[str, Constant]:
        """See Family."""
        del model, max_position_embeddings
        return {}

    def duplicates(self, model: ModelConfig) -> Mapping[str, str]:
        """See Family."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}

    def unused(self, model: ModelConfig, objective: Objective) -> Mapping[str, str]:
        """See Family."""
        del model, objective
        return {}


def causal_only(model: ModelConfig, objective: Objective) -> list[str]:
    """Clauses against anything but a causal model with a plain output layer."""
    if objective.kind != "causal":
        return [f"objective.kind = {objective.kind!r} and not 'causal'"]
    return ["model.head_transform = true"] if model.transforms_head(masked=False) else []

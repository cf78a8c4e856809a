"""GPT-NeoX: layer norms, GELU, biases, partial rotation, residual branches in parallel or in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.interop.family import SIZES, Constant, Description, Pairing, Weight, unexpressed
from roformer_dist.interop.llama import causal_only
from roformer_dist.interop.rope import read_rope, write_rope
from roformer_dist.interop.settings import Settings

# Its name in files; transformers calls the loaded one lm_head.
OUTPUT = "embed_out.weight"


class GptNeoxFamily:
    """See Family. Queries, keys and values are one matrix there, head by head."""

    name = "GPTNeoX"
    model_type = "gpt_neox"
    pairing: Pairing = "half"
    ignored = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"

    def read(
        self, settings: Settings, architecture: str, num_labels: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See Family."""
        del architecture, num_labels
        settings.require("hidden_act", "gelu")
        settings.require("is_encoder_decoder", False)
        settings.take_or("is_decoder", None)  # not read there
        settings.take_or("classifier_dropout", None)
        trained = settings.peek("max_position_embeddings")
        rope = read_rope(settings.take("rope_parameters"), trained=trained, source=settings.source)
        model = {
            "vocab_size": settings.take("vocab_size"),
            "hidden_size": settings.take("hidden_size"),
            "num_layers": settings.take("num_hidden_layers"),
            "num_heads": settings.take("num_attention_heads"),
            "intermediate_size": settings.take("intermediate_size"),
            "block": "parallel" if settings.flag("use_parallel_residual") else "pre_norm",
            "norm": "layer_norm",
            "norm_eps": settings.number("layer_norm_eps"),
            "mlp": "gelu",
            "bias": True,
            "attention_bias": "all" if settings.flag("attention_bias") else "none",
            "tie_embeddings": settings.flag("tie_word_embeddings"),
            "hidden_dropout": settings.number("hidden_dropout"),
            "init_std": settings.number("initializer_range"),
            "rope": {**rope, "pairing": "half"},
        }
        settings.note_attention_dropout("attention_dropout")
        return model, {"kind": "causal"}

    def write(self, description: Description) -> dict[str, Any]:
        """See Family."""
        model, trained = description.model, description.max_position_embeddings
        rope = write_rope(model.rope, model.head_size, trained)
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.intermediate_size,
            "use_parallel_residual": model.block == "parallel",
            "layer_norm_eps": model.norm_eps,
            "attention_bias": model.biased_projections == "all",
            "tie_word_embeddings": model.tie_embeddings,
            "hidden_dropout": model.hidden_dropout,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
            "max_position_embeddings": trained,
            "rope_parameters": {**rope, "partial_rotary_factor": model.rope.partial},
        }

    def mismatches(self, model: ModelConfig, objective: Objective) -> list[str]:
        """See Family."""
        wanted: dict[str, tuple[object, ...]] = {
            "block": ("parallel", "pre_norm"),
            "norm": ("layer_norm",),
            "mlp": ("gelu",),
            "bias": (True,),
            "biased_projections": ("none", "all"),
            "qk_norm": (False,),
            "kv_heads": (model.num_heads,),
            "head_size": (model.hidden_size / model.num_heads,),
            "embedding_width": (model.hidden_size,),
            "rope.rotary_value": (False,),
        }
        free = SIZES | {"attention_bias", "num_kv_heads", "head_dim", "embedding_size", "head_transform"}
        return unexpressed(model, wanted, free) + causal_only(model, objective)

    def weights(self, model: ModelConfig, objective: Objective) -> list[Weight]:
        """See Family."""
        del objective
        weights = [Weight("gpt_neox.embed_in.weight", ("embedding.weight",))]
        for i in range(model.num_layers):
            theirs, ours = f"gpt_neox.layers.{i}", f"blocks.{i}"
            for part in ("weight", "bias"):
                pairs = {
                    f"{theirs}.input_layernorm.{part}": f"{ours}.attention_norm.{part}",
                    f"{theirs}.post_attention_layernorm.{part}": f"{ours}.mlp_norm.{part}",
                    f"{theirs}.mlp.dense_h_to_4h.{part}": f"{ours}.mlp.up_proj.{part}",
                    f"{theirs}.mlp.dense_4h_to_h.{part}": f"{ours}.mlp.down_proj.{part}",
                }
                weights += [Weight(a, (b,)) for a, b in pairs.items()]
                if part == "bias" and model.biased_projections == "none":
                    continue
                fused = tuple(f"{ours}.attention.{x}_proj.{part}" for x in "qkv")
                weights.append(Weight(f"{theirs}.attention.query_key_value.{part}", fused))
                weights.append(
                    Weight(f"{theirs}.attention.dense.{part}", (f"{ours}.attention.o_proj.{part}",))
                )
        weights += [
            Weight(f"gpt_neox.final_layer_norm.{part}", (f"final_norm.{part}",))
            for part in ("weight", "bias")
        ]
        if not model.tie_embeddings:
            weights.append(Weight(OUTPUT, ("head.projection.weight",)))
        return weights

    def constants(self, model: ModelConfig, max_position_embeddings: int) -> Mapping[str, Constant]:
        """See Family."""
        del model, max_position_embeddings
        return {}

    def duplicates(self, model: ModelConfig) -> Mapping[str, str]:
        """See Family."""
        return {OUTPUT: "gpt_neox.embed_in.weight"} if model.tie_embeddings else {}

    def unused(self, model: ModelConfig, objective: Objective) -> Mapping[str, str]:
        """See Family."""
        del model, objective
        return {}

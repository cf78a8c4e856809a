"""What every family of Hugging Face models says about itself, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from roformer_dist.config.data import Objective
from roformer_dist.config.model import ModelConfig
from roformer_dist.config.rope import RopeConfig
from roformer_dist.interop.settings import Settings

Pairing = Literal["interleaved", "half"]


@dataclass(frozen=True)
class Weight:
    """One tensor of theirs, and the parameter or parameters of ours that it holds.

    Several are stacked head by head: for each head the rows of the first, then of the second, and so on.
    """

    theirs: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that follows from the configuration; ``make`` gives it in float32."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Description:
    """A model as both sides describe it.

    Attributes:
        model, objective: our sections.
        max_position_embeddings: the length that theirs is said to be good for.
        notes: what was left out because it does not change what the model computes, for the user to read.
    """

    model: ModelConfig
    objective: Objective
    max_position_embeddings: int
    notes: tuple[str, ...] = field(default=())


class Family(Protocol):
    """An architecture of transformers: its configuration and weights, both ways.

    Attributes:
        name: what users call it.
        model_type: its name in ``config.json``.
        pairing: which dimensions it turns together.
        ignored: a pattern of tensors that old releases saved and that hold no weights.
    """

    name: str
    model_type: str
    pairing: Pairing
    ignored: str

    def read(
        self, settings: Settings, architecture: str, num_labels: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Our model and objective sections, as values; takes its keys from ``settings``."""
        ...

    def write(self, description: Description) -> dict[str, Any]:
        """The keywords of its configuration class, and ``architectures``."""
        ...

    def mismatches(self, model: ModelConfig, objective: Objective) -> list[str]:
        """What of this model it cannot express, each as one clause; empty if it can all of it."""
        ...

    def weights(self, model: ModelConfig, objective: Objective) -> list[Weight]:
        """Every tensor that it saves, but those of ``constants``."""
        ...

    def constants(self, model: ModelConfig, max_position_embeddings: int) -> Mapping[str, Constant]:
        """Tensors that it saves and that follow from the configuration."""
        ...

    def duplicates(self, model: ModelConfig) -> Mapping[str, str]:
        """Tensors that may be saved beside the one that they are tied to: name, and name of the other."""
        ...

    def unused(self, model: ModelConfig, objective: Objective) -> Mapping[str, str]:
        """Tensors that it saves and does not compute with, and which of the others to write there."""
        ...


# What decides no logits: dropout and initial weights are settings of training.
_TRAINING = {"hidden_dropout", "attention_dropout", "init_std"}
# What write_rope, the pairing and each family's own list look at.
_ROPE = {"theta", "pairing", "scaling", "partial", "rotary_value"}


def unexpressed(model: ModelConfig, wanted: Mapping[str, tuple[object, ...]], free: set[str]) -> list[str]:
    """Clauses for what differs from ``wanted`` (key: what is allowed), and for keys set that nobody looked at.

    Args:
        wanted: keys or properties of the model section, with a dot for those of its rope section.
        free: keys that the family can express whatever they are.
    """
    clauses = []
    for key, allowed in wanted.items():
        value: Any = model
        for part in key.split("."):
            value = getattr(value, part)
        if value not in allowed:
            clauses.append(f"model.{key} = {value!r} and not {' or '.join(map(repr, allowed))}")
    for key, info in RopeConfig.model_fields.items():
        if key not in _ROPE and getattr(model.rope, key) != info.get_default(call_default_factory=True):
            clauses.append(f"model.rope.{key} = {getattr(model.rope, key)!r}")
    looked_at = free | _TRAINING | {key.split(".")[0] for key in wanted}
    for key, info in ModelConfig.model_fields.items():
        if key == "layers" and set(model.layers) == {"full"}:
            continue  # however often the pattern says it
        if key not in looked_at and getattr(model, key) != info.get_default(call_default_factory=True):
            clauses.append(f"model.{key} = {getattr(model, key)!r}")
    return clauses


# What every family can have as it likes.
SIZES = {
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "norm_eps",
    "tie_embeddings",
}

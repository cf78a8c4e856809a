"""The sections that describe what is read and what is predicted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from roformer_dist.config.section import Section


class CausalObjective(Section):
    """Predict the next token of the document."""

    kind: Literal["causal"] = "causal"


class MaskedObjective(Section):
    """Predict masked tokens from both sides (BERT's 80/10/10 rule)."""

    kind: Literal["masked"]
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens to predict."""
    mask_id: Annotated[int, Field(ge=0)] | None = None
    """The token that stands for a masked one; default: the one that the shards were made with."""


class ClassificationObjective(Section):
    """Predict the class of a whole row from both sides."""

    kind: Literal["classification"]
    num_labels: Annotated[int, Field(ge=2)]
    """Number of classes."""
    pooling: Literal["first", "mean"] = "first"
    """What is classified: the features of a row's first token (as Hugging Face's head does), or their mean."""


Objective = Annotated[
    CausalObjective | MaskedObjective | ClassificationObjective, Field(discriminator="kind")
]


class SourceConfig(Section):
    """Packed data: shards and the plan made from them."""

    shards: str
    """Directory of shards, written by ``data shards``."""
    plan: str
    """Packing plan, written by ``data pack``."""


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str
    """The sentencepiece model that made the shards."""
    train: SourceConfig
    """What is trained on."""
    validation: SourceConfig
    """What is held out."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that read ahead; 0 reads in the training thread."""

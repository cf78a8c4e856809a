"""The sections that describe what is read and what is predicted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from roformer_dist.config.section import PositiveFloat, PositiveInt, Section


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
    """Directory or URL of shards, written by ``data shards``."""
    plan: str
    """Packing plan, written by ``data pack``; rows may be shorter than train.seq_len if they divide it."""


class WeightedSourceConfig(SourceConfig):
    """One source of a mixture."""

    weight: PositiveFloat = 1.0
    """Its share of the tokens, relative to the other sources of the stage."""


class StageConfig(Section):
    """Some steps on one mixture of sources."""

    num_steps: PositiveInt | None = None
    """Steps of the stage; only the last may leave it out, and takes the rest of train.num_steps."""
    sources: Annotated[tuple[WeightedSourceConfig, ...], Field(max_length=16, strict=False)]
    """What is mixed; a plan of several row lengths must be alone."""


# So many, in eight stages, fit into the kilobyte of ``roformer_dist.data.state`` with all that may be quarantined.
MAX_FOLDERS = 32


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str
    """The sentencepiece model that made the shards."""
    train: SourceConfig | None = None
    """What is trained on, where it is one source; else give stages."""
    stages: Annotated[tuple[StageConfig, ...], Field(max_length=8, strict=False)] | None = None
    """What is trained on, one after another; instead of train."""
    validation: SourceConfig
    """What is held out."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads that read ahead; 0 reads in the training thread."""
    on_corrupt: Literal["raise", "quarantine"] = "raise"
    """A damaged document of the training data stops the run, or is left out and recorded."""
    cache_dir: str | None = None
    """Where shards from URLs are kept on each node; default: roformer_dist in the user's cache directory."""
    cache_gb: PositiveFloat = 64.0
    """The most that cache_dir holds, in 10^9 bytes."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.train is None) == (self.stages is None):
            found = "both data.train and data.stages" if self.train else "neither data.train nor data.stages"
            raise ValueError(f"{found}; give one of them")
        if self.stages == () or any(not stage.sources for stage in self.stages or ()):
            raise ValueError("stages: give at least one, each with at least one source")
        for number, stage in enumerate((self.stages or ())[:-1]):
            if stage.num_steps is None:
                raise ValueError(f"stages.{number} has no num_steps; only the last may leave it out")
        folders = {source.shards for stage in self.training for source in stage.sources}
        if len(folders) > MAX_FOLDERS:
            raise ValueError(
                f"stages: {len(folders)} shards folders, more than the {MAX_FOLDERS} whose position fits into a "
                "checkpoint's record; merge some with data shards, which takes several --input"
            )
        return self

    @property
    def training(self) -> tuple[StageConfig, ...]:
        """The stages; ``train`` alone is one of them."""
        if self.stages is not None:
            return self.stages
        assert self.train is not None
        source = WeightedSourceConfig(shards=self.train.shards, plan=self.train.plan)
        return (StageConfig(sources=(source,)),)

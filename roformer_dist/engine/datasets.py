"""From the configuration's data section to this rank's loader and validation batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from roformer_dist.batch import Batch
from roformer_dist.config import Config, RunShape
from roformer_dist.config.data import ClassificationObjective, SourceConfig
from roformer_dist.config.data import MaskedObjective as MaskedConfig
from roformer_dist.data.errors import DataError
from roformer_dist.data.files import sha256_file
from roformer_dist.data.loader import Loader, evaluation_batches
from roformer_dist.data.objective import CausalObjective, MaskedObjective, Objective
from roformer_dist.data.plan import Plan
from roformer_dist.data.store import ShardStore


class RunData:
    """The training loader and the validation rows of one data-parallel rank."""

    def __init__(self, config: Config, shape: RunShape, dp_rank: int) -> None:
        self._config, self._shape, self._dp_rank = config, shape, dp_rank
        store, plan = open_source(config, config.data.train)
        self._objective = make_objective(config, store)
        self._validation = open_source(config, config.data.validation)
        self.loader = Loader(
            store,
            plan,
            seed=config.train.seed,
            rows_per_step=shape.rows_per_step,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=shape.dp_size,
            objective=self._objective,
            workers=config.data.workers,
        )

    def validation(self) -> Iterator[Batch]:
        """This replica's validation batches, the same number on every replica."""
        store, plan = self._validation
        return evaluation_batches(
            store,
            plan,
            rows=self._config.validation.rows,
            micro_batch_size=self._config.train.micro_batch_size,
            dp_rank=self._dp_rank,
            dp_size=self._shape.dp_size,
            objective=self._objective,
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self.loader.close()


def make_objective(config: Config, store: ShardStore) -> Objective:
    """The configured objective as the data pipeline's.

    Raises:
        DataError: a mask token that the text can contain, or classes, which shards do not hold.
    """
    if isinstance(config.objective, ClassificationObjective):
        raise DataError(
            'objective.kind = "classification" needs a class for each row, and shards hold none; such a model can be '
            'imported, exported and called from Python, and trained with objective.kind = "masked" or "causal"'
        )
    if isinstance(config.objective, MaskedConfig):
        wanted, mask_id = config.objective.mask_id, store.manifest.mask_id
        if wanted not in (None, mask_id):
            raise DataError(
                f"objective.mask_id = {wanted}, but the shards' tokenizer keeps {mask_id} for masked tokens; "
                "leave the key out"
            )
        return MaskedObjective(
            mask_id=mask_id,
            vocab_size=config.model.vocab_size,
            mask_probability=config.objective.mask_probability,
        )
    return CausalObjective()


def open_source(config: Config, source: SourceConfig) -> tuple[ShardStore, Plan]:
    """Shards and plan of one source, checked against each other and the configuration.

    Raises:
        DataError: a missing or damaged file, rows of another length, or a vocabulary that does not fit.
    """
    store, plan = ShardStore(source.shards), Plan.load(source.plan)
    plan.check_store(store)
    if plan.seq_len != config.train.seq_len:
        raise DataError(
            f"{source.plan}: packed into rows of {plan.seq_len} tokens, train.seq_len = {config.train.seq_len}; "
            "run data pack with that --seq-len"
        )
    if sha256_file(Path(config.data.tokenizer)) != store.manifest.tokenizer_sha256:
        raise DataError(
            f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that {source.shards} was made with; "
            f"that one is {store.tokenizer_path}"
        )
    if store.manifest.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{source.shards}: made with a vocabulary of {store.manifest.vocab_size}, "
            f"model.vocab_size = {config.model.vocab_size} is smaller"
        )
    return store, plan

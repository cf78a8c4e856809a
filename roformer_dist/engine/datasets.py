"""From the configuration's data section to this rank's loader and validation batches."""

from __future__ import annotations

from collections.abc import Iterator

from roformer_dist.batch import Batch
from roformer_dist.config import Config, RunShape
from roformer_dist.config.data import ClassificationObjective, SourceConfig
from roformer_dist.config.data import MaskedObjective as MaskedConfig
from roformer_dist.data.cache import ShardCache
from roformer_dist.data.errors import DataError
from roformer_dist.data.loader import Loader, evaluation_batches
from roformer_dist.data.objective import CausalObjective, MaskedObjective, Objective
from roformer_dist.data.plan import Plan, load_plans
from roformer_dist.data.remote import is_url, read_bytes, sha256_bytes
from roformer_dist.data.stages import Source, Stage
from roformer_dist.data.store import ShardStore


class RunData:
    """The training loader and the validation rows of one data-parallel rank."""

    def __init__(self, config: Config, shape: RunShape, dp_rank: int) -> None:
        self._config, self._shape, self._dp_rank = config, shape, dp_rank
        opened = Opened(config)
        stages = [
            Stage(
                tuple(Source(*opened.source(source), source.weight) for source in stage.sources),
                stage.num_steps,
            )
            for stage in config.data.training
        ]
        self._validation = opened.rows(config.data.validation)
        self._objective = make_objective(config, self._validation[0])
        self.loader = Loader(
            stages,
            seed=config.train.seed,
            seq_len=config.train.seq_len,
            global_batch=shape.rows_per_step,
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


class Opened:
    """The shards that a configuration names, each opened once and checked against it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tokenizer_sha256 = sha256_bytes(read_bytes(config.data.tokenizer))
        self._cache: ShardCache | None = None
        self._stores: dict[str, ShardStore] = {}

    def store(self, shards: str) -> ShardStore:
        """Open a shards folder.

        Raises:
            DataError: missing or damaged, another tokenizer, or a vocabulary that does not fit.
        """
        if shards not in self._stores:
            self._stores[shards] = self._open(shards)
        return self._stores[shards]

    def source(self, source: SourceConfig) -> tuple[ShardStore, tuple[Plan, ...]]:
        """Shards and plans, checked against each other.

        Raises:
            DataError: as ``store``, or a plan that is missing, damaged or of other shards.
        """
        store, plans = self.store(source.shards), tuple(load_plans(source.plan))
        for plan in plans:
            plan.check_store(store)
        return store, plans

    def rows(self, source: SourceConfig) -> tuple[ShardStore, Plan]:
        """Shards and the one plan whose rows are the whole ``train.seq_len``, as validation needs them.

        Raises:
            DataError: as ``source``, or rows of another length.
        """
        store, plans = self.source(source)
        lengths = ", ".join(str(plan.seq_len) for plan in plans)
        if lengths != str(self._config.train.seq_len):
            raise DataError(
                f"{source.plan}: packed into rows of {lengths} tokens, train.seq_len = "
                f"{self._config.train.seq_len}; run data pack with that --seq-len"
            )
        return store, plans[0]

    def _open(self, shards: str) -> ShardStore:
        config = self._config
        if is_url(shards) and self._cache is None:
            self._cache = ShardCache(config.data.cache_dir, int(config.data.cache_gb * 10**9))
        # A tar that was cut off has lost documents, which quarantine leaves out as it comes to them.
        store = ShardStore(shards, cache=self._cache, check_sizes=config.data.on_corrupt == "raise")
        if self._tokenizer_sha256 != store.manifest.tokenizer_sha256:
            raise DataError(
                f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that {shards} was made with; "
                f"that one is {store.tokenizer_path}"
            )
        if store.manifest.vocab_size > config.model.vocab_size:
            raise DataError(
                f"{shards}: made with a vocabulary of {store.manifest.vocab_size}, "
                f"model.vocab_size = {config.model.vocab_size} is smaller"
            )
        return store

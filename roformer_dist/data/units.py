"""What is packed: units of documents that stay together, in seeded shard groups, some of them repeated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roformer_dist.data.hashing import hash64
from roformer_dist.data.plan import PackOptions
from roformer_dist.data.store import ShardStore


@dataclass(frozen=True)
class Units:
    """Documents that are laid out one after the other: one each, or all of one group key.

    Attributes:
        members: int64 ``[documents]``; unit ``u`` is ``members[offsets[u]:offsets[u + 1]]``, in order.
        offsets: int64 ``[units + 1]``.
        begins: int64 ``[documents + 1]``, where each member's tokens begin when all are joined.
        shard_group: int64 ``[units]``, not decreasing.
        copies: int64 ``[units]``, how often each is laid out.
        num_groups: shard groups.
    """

    members: np.ndarray
    offsets: np.ndarray
    begins: np.ndarray
    shard_group: np.ndarray
    copies: np.ndarray
    num_groups: int

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[units]``, tokens of each."""
        return np.diff(self.begins[self.offsets])

    @property
    def first_member(self) -> np.ndarray:
        """int64 ``[units]``, the first document of each: what identifies it in draws."""
        return self.members[self.offsets[:-1]]

    def document_copies(self) -> np.ndarray:
        """int64 ``[documents]``, how often each document is laid out."""
        result = np.empty(len(self.members), np.int64)
        result[self.members] = np.repeat(self.copies, np.diff(self.offsets))
        return result

    def shuffled(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Every copy of every unit, in shard groups, shuffled in each: ``(units, offsets of the groups)``."""
        unit = np.repeat(np.arange(len(self.copies)), self.copies)
        copy = np.arange(len(unit)) - np.repeat(np.cumsum(self.copies) - self.copies, self.copies)
        draws = hash64(seed, 0, self.first_member[unit], copy)
        order = (
            np.lexsort((draws, self.shard_group[unit]))
            if self.num_groups > 1
            else draws.argsort(kind="stable")
        )
        unit = unit[order]
        return unit, np.searchsorted(self.shard_group[unit], np.arange(self.num_groups + 1))


def shard_groups(num_shards: int, options: PackOptions) -> tuple[np.ndarray, int]:
    """The shard group of each shard (int64 ``[shards]``) and how many there are.

    The shards are shuffled and cut into the fewest groups of at most ``shards_per_group``, whose
    sizes differ by at most one.
    """
    count = -(-num_shards // options.shards_per_group)
    order = np.argsort(hash64(options.seed, 2, np.arange(num_shards)), kind="stable")
    result = np.empty(num_shards, np.int64)
    result[order] = np.arange(num_shards) * count // num_shards
    return result, count


def document_groups(store: ShardStore, options: PackOptions) -> tuple[np.ndarray, int]:
    """The shard group of each document (int64 ``[documents]``) and how many there are."""
    per_shard = [shard.documents for shard in store.manifest.shards]
    of_shard, count = shard_groups(len(per_shard), options)
    return np.repeat(of_shard, per_shard), count


def units_of(store: ShardStore, options: PackOptions) -> Units:
    """The units of a store, with their copies."""
    group, num_groups = document_groups(store, options)
    lengths = store.lengths
    if options.group_by_key:
        key = store.groups
        members = np.lexsort((key, group))  # stable: input order within a key
        key, ordered = key[members], group[members]
        new = np.ones(len(members), bool)
        new[1:] = (key[1:] == 0) | (key[1:] != key[:-1]) | (ordered[1:] != ordered[:-1])
        offsets = np.append(np.flatnonzero(new), len(members))
    else:
        members = np.argsort(group, kind="stable")
        offsets = np.arange(len(members) + 1)
    begins = np.concatenate([[0], np.cumsum(lengths[members])])
    first = members[offsets[:-1]]
    copies = _copies(np.diff(begins[offsets]), first, options)
    return Units(members, offsets, begins, group[first], copies, num_groups)


def _copies(lengths: np.ndarray, identity: np.ndarray, options: PackOptions) -> np.ndarray:
    """How often each unit is laid out: the whole part of its factor, and once more for a share of
    the units under that rule that is exact to half a unit, those with the smallest draws."""
    copies = np.ones(len(lengths), np.int64)
    rules = sorted(options.upsample)
    for number, (min_tokens, factor) in enumerate(rules):
        below = rules[number + 1][0] if number + 1 < len(rules) else np.inf
        chosen = np.flatnonzero((lengths >= min_tokens) & (lengths < below))
        whole = int(factor)
        copies[chosen] = whole
        extra = int((factor - whole) * len(chosen) + 0.5)
        draws = hash64(options.seed, 3, identity[chosen])
        copies[chosen[np.argsort(draws, kind="stable")[:extra]]] += 1
    return copies

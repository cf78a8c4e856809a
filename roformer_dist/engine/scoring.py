"""What an evaluation asks of a network over ranks that share every row: losses, and continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roformer_dist.batch import IGNORE_INDEX, Batch
from roformer_dist.kernels.attention import Kernel
from roformer_dist.model.generation import generate
from roformer_dist.model.roformer import RoFormer
from roformer_dist.objectives import token_nll
from roformer_dist.parallel.comm import Comm
from roformer_dist.parallel.mesh import Mesh
from roformer_dist.parallel.sequence_ops import sequence_ops, single_sequence_ops
from roformer_dist.parallel.shared_cache import SharedCache

_PREFILL_TOKENS = 16_384  # of one forward, over all prompts


class Scorer:
    """Each row is sliced over the ranks of ``mesh`` as in training; what comes back is in the order of the row.

    Args:
        kernel: what attends.
        mesh: all of its ranks share each row.
        device: that of the network.
    """

    def __init__(self, kernel: Kernel, mesh: Mesh, device: torch.device | str = "cpu") -> None:
        assert mesh.dp_size == 1, "every rank has a part of every row"
        self._ops, self._layout = sequence_ops(kernel, mesh)
        self._comm, self._device = mesh.sp, torch.device(device)

    def __call__(self, network: RoFormer, batch: Batch) -> Tensor:
        """Negative log-likelihood float64 ``[V]`` on the CPU of the batch's V valid targets, row by row.

        ``batch`` is whole and the same on every rank, and so is the result.
        """
        part = self._layout.slice(batch, self._comm.rank)
        nll, valid = token_nll(network, part.to(self._device), self._ops)
        rows, seq_len = batch.labels.shape
        counted = (batch.labels != IGNORE_INDEX).flatten()
        # The number of each place's target among all targets; a place that pads a row is never asked for.
        number = counted.cumsum(0) - 1
        places = self._layout.indices(part.mask, rows, self._comm.rank)
        places = (places + torch.arange(rows)[:, None] * seq_len)[valid.cpu()]
        whole = torch.zeros(int(counted.sum()), dtype=torch.float64, device=self._device)
        whole[number[places].to(self._device)] = nll.double()
        return self._comm.all_sum(whole).cpu()


class Continuer:
    """Greedy continuations; the cache of keys lies on all ranks.

    Args:
        kernel: what attends.
        comm: the ranks, which all ask for the same.
        device: that of the network.
    """

    def __init__(self, kernel: Kernel, comm: Comm, device: torch.device | str = "cpu") -> None:
        self._ops = single_sequence_ops(kernel)
        self._ranks = SharedCache(kernel, comm, device) if comm.size > 1 else None

    def __call__(self, network: RoFormer, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
        """The next ``new_tokens`` tokens of each prompt int64 ``[n]``; the same on all ranks."""
        results = generate(
            network,
            self._ops,
            prompts,
            max_new_tokens=new_tokens,
            prefill_chunk=_PREFILL_TOKENS,
            ranks=self._ranks,
        )
        return [result.tokens for result in results]

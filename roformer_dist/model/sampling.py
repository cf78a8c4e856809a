"""From logits to a token: greedy, or drawn after temperature, top-k and top-p, in that order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: logits are divided by it; 0: the largest logit, the first of equal ones.
        top_k: only so many largest logits count (and those equal to the last of them); None: all.
        top_p: only the fewest tokens count whose probabilities add up to it (arXiv 1904.09751); 1: all.
        seed: of the draws; each sequence has draws of its own, whatever stands beside it.

    Raises:
        ValueError: a number outside its range, or top_k or top_p with temperature 0, where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits over less would leave float32.
        if not (math.isfinite(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6)):
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1; leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed = {self.seed} must be from 0 to 2^62 - 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "top_k and top_p are about drawing tokens, and temperature 0 takes the likeliest; set a temperature"
            )

    def generator(self, sequence: int) -> torch.Generator:
        """The draws of one sequence, by its number."""
        return torch.Generator().manual_seed(self.seed + sequence)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token for ``logits`` ``[vocab_size]``.

        Raises:
            ValueError: a logit that is NaN or infinite.
        """
        if not logits.isfinite().all():
            raise ValueError(
                "the model's logits are NaN or infinite, so it has no next token: its weights are damaged or too large "
                "for their precision; give an earlier checkpoint"
            )
        if self.temperature == 0:
            return int(logits.float().argmax())
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, float32 ``[vocab_size]`` on the CPU; the temperature is above 0."""
        logits = logits.float().cpu() / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            smallest = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ranked, order = logits.softmax(-1).sort(descending=True, stable=True)
            # A token is out when those before it suffice; the first always stays.
            enough = ranked.cumsum(-1) - ranked >= self.top_p
            logits = logits.index_fill(0, order[enough], -torch.inf)
        return logits.softmax(-1)

"""An algorithm of a user's own, as ``--algo tests/unit/example_algorithm.py:FarApart`` takes it.

It samples four candidates, sends the two whose log-probabilities are farthest apart to the oracle, leaves out prompts
where even these are close, and learns with SLiC's hinge on length-averaged log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from oatlite.algorithms.base import Algorithm, CandidateSet, Duel, Options
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class FarApartOptions(Options):
    margin: float = 1.0
    min_gap: float = 0.0
    num_candidates: int = 4


class FarApart(Algorithm):
    Options = FarApartOptions

    def sampling_plan(self) -> Sequence[str]:
        return ("policy",) * self.options.num_candidates

    def select(
        self, candidates: Sequence[CandidateSet], scores: Mapping[str, Any], rng: np.random.Generator
    ) -> list[Duel]:
        duels = []
        for m, found in enumerate(candidates):
            logprobs = [float(candidate.logprobs.mean()) for candidate in found.candidates]
            low, high = int(np.argmin(logprobs)), int(np.argmax(logprobs))
            if low != high and logprobs[high] - logprobs[low] >= self.options.min_gap:
                duels.append(Duel(m, low, high))
        return duels

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        chosen = policy.chosen / policy.chosen_lengths
        rejected = policy.rejected / policy.rejected_lengths
        losses = torch.relu(self.options.margin - (chosen - rejected))
        return PairLosses(losses, chosen.detach(), rejected.detach())

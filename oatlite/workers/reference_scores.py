"""What the reference makes of candidates before the oracle is asked: one more question to the learner's own reference
model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from oatlite.algorithms.base import CandidateSet
from oatlite.config.schema import Config
from oatlite.layouts import TokenPair
from oatlite.messages import Float32

ScorePairs = Callable[[Sequence[TokenPair], int], list[Float32]]
"""``score(pairs, at_most)``: the reference's log-probabilities of the tokens of both responses of each pair, the first
one's before the second's; all ranks together, none of which has more than ``at_most`` pairs."""


class ReferenceScores:
    """log pi_ref of each candidate, (M, N), of the ``num_candidates`` of each prompt; all ranks together."""

    def __init__(self, config: Config, score_pairs: ScorePairs, num_candidates: int) -> None:
        self._score_pairs = score_pairs
        self._num_candidates = num_candidates
        ranks = int(config.placement.learners or 1)
        self._most_prompts = -(-config.rollout.prompts_per_step // ranks)

    def __call__(self, sets: Sequence[CandidateSet]) -> npt.NDArray[np.float64]:
        """Two candidates by two, which share their prompt; an odd last one stands on both sides."""
        halves = range(0, self._num_candidates, 2)
        pairs = []
        for one in sets:
            for n in halves:
                left, right = one.candidates[n], one.candidates[min(n + 1, self._num_candidates - 1)]
                pairs.append(TokenPair(prompt=one.prompt_tokens, chosen=left.tokens, rejected=right.tokens))
        scored = self._score_pairs(pairs, len(halves) * self._most_prompts)
        sums = [
            (float(found[: len(pair.chosen)].sum()), float(found[len(pair.chosen) :].sum()))
            for pair, found in zip(pairs, scored, strict=True)
        ]
        flat = np.array(sums, np.float64).reshape(len(sets), 2 * len(halves))
        return flat[:, : self._num_candidates]

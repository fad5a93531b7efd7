"""Active preference learning: the model's own log-probabilities say which prompts and pairs are worth a query."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from oatlite.algorithms.base import CandidateSet, Duel
from oatlite.config.schema import Config
from oatlite.maths.exploration import least_certain_prompts, most_separated_pairs
from oatlite.messages import Float32
from oatlite.models import TokenPair
from oatlite.workers.explorer import Choice

ScorePairs = Callable[[Sequence[TokenPair], int], list[Float32]]
"""``score(pairs, at_most)``: the reference's log-probabilities of the tokens of both responses of each pair, the first
one's before the second's; all ranks together, none of which has more than ``at_most`` pairs."""


class ActivePreferences:
    """APL (arXiv 2402.08114, algorithm 1): of the prompts, those whose responses the policy is the least sure of; of
    each, the two candidates that the implicit reward ``log pi - log pi_ref`` tells apart the most; and of these pairs
    those that it tells apart the most.

    The policy's log-probabilities are the sampler's, and the reference's those of the learner's reference model.
    """

    def __init__(self, config: Config, score_by_reference: ScorePairs) -> None:
        self._config = config
        self._score_by_reference = score_by_reference

    def choose(self, sets: Sequence[CandidateSet], step: int) -> Choice:
        """See :meth:`oatlite.workers.explorer.Explorer.choose`; nothing is drawn, and the head is not there."""
        del step
        start = time.perf_counter()
        options = self._config.explore
        sums = [[float(candidate.logprobs.sum()) for candidate in one.candidates] for one in sets]
        policy = np.array(sums, np.float64).reshape(len(sets), options.num_candidates)
        asked = least_certain_prompts(policy, options.entropy_share)
        reference = self._reference([sets[m] for m in asked])
        kept, first, second = most_separated_pairs(policy[asked] - reference, options.certainty_share)
        duels = [Duel(int(asked[k]), int(one), int(other)) for k, one, other in zip(kept, first, second, strict=True)]
        return Choice(
            duels=duels,
            is_self_labelled=np.zeros(len(duels), np.bool_),
            features=None,
            seconds=time.perf_counter() - start,
        )

    def learn(self, comparisons: Float32, num_asked: int, num_before: int) -> dict[str, float]:
        """There is nothing here to learn."""
        del comparisons, num_asked, num_before
        return {}

    def _reference(self, sets: Sequence[CandidateSet]) -> np.ndarray:
        """log pi_ref of each candidate, (M, N): two by two, which share their prompt."""
        num_candidates = self._config.explore.num_candidates
        halves = range(0, num_candidates, 2)
        pairs = []
        for one in sets:
            for n in halves:
                left, right = one.candidates[n], one.candidates[min(n + 1, num_candidates - 1)]
                pairs.append(TokenPair(prompt=one.prompt_tokens, chosen=left.tokens, rejected=right.tokens))
        ranks = int(self._config.placement.learners or 1)
        at_most = len(halves) * -(-self._config.rollout.prompts_per_step // ranks)
        scored = self._score_by_reference(pairs, at_most)
        sums = [
            (float(found[: len(pair.chosen)].sum()), float(found[len(pair.chosen) :].sum()))
            for pair, found in zip(pairs, scored, strict=True)
        ]
        flat = np.array(sums, np.float64).reshape(len(sets), 2 * len(halves))
        return flat[:, :num_candidates]

"""Active preference learning: the model's own log-probabilities say which prompts and pairs are worth a query."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from oatlite.algorithms.base import CandidateSet, Duel
from oatlite.config.schema import Config
from oatlite.maths.exploration import least_certain_prompts, most_separated_pairs
from oatlite.messages import Float32
from oatlite.workers.explorer import Choice
from oatlite.workers.reference_scores import ReferenceScores, ScorePairs


class ActivePreferences:
    """APL (arXiv 2402.08114, algorithm 1): of the prompts, those whose responses the policy is the least sure of; of
    each, the two candidates that the implicit reward ``log pi - log pi_ref`` tells apart the most; and of these pairs
    those that it tells apart the most.

    The policy's log-probabilities are the sampler's, and the reference's those of the learner's reference model. Both
    are at temperature 1, the responses at that of sampling: so the entropy is the one that oat estimates, and equation
    4's at temperature 1 alone.
    """

    def __init__(self, config: Config, score_by_reference: ScorePairs) -> None:
        self._config = config
        self._reference = ReferenceScores(config, score_by_reference, config.explore.num_candidates)

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

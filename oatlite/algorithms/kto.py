"""KTO: each response is judged for itself, against the policy's divergence (arXiv 2402.01306)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import KTOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class KTO(Algorithm):
    needs = Needs(reference=True, kl=True)
    Options = KTOConfig

    def __init__(self, options: Any) -> None:
        self.options: KTOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        assert batch.policy_kl is not None and batch.reference_kl is not None
        return losses.kto(
            *sums(policy, reference),
            beta=self.options.beta,
            policy_kl=batch.policy_kl,
            reference_kl=batch.reference_kl,
            desirable_weight=self.options.desirable_weight,
            undesirable_weight=self.options.undesirable_weight,
        )

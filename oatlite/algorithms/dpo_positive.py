"""DPO-Positive: DPO that keeps the chosen response likely (arXiv 2402.13228)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import DPOPositiveConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class DPOPositive(Algorithm):
    needs = Needs(reference=True)
    Options = DPOPositiveConfig

    def __init__(self, options: Any) -> None:
        self.options: DPOPositiveConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        options = self.options
        return losses.dpo_positive(*sums(policy, reference), beta=options.beta, positive_lambda=options.positive_lambda)

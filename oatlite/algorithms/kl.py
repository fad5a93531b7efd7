"""The policy's verdict drawn to the oracle's, KL(policy || oracle)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import KLConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class KL(Algorithm):
    needs = Needs(reference=True, margins=True)
    Options = KLConfig

    def __init__(self, options: Any) -> None:
        self.options: KLConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        margins = self.options.margin_scale * batch.margins
        return losses.kl(*sums(policy, reference), beta=self.options.beta, margins=margins)

"""SLiC: a hinge on the margin of log-ratios (arXiv 2305.10425, 2309.06657)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import SLiCConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class SLiC(Algorithm):
    needs = Needs(reference=True)
    Options = SLiCConfig

    def __init__(self, options: Any) -> None:
        self.options: SLiCConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.slic(*sums(policy, reference), beta=self.options.beta)

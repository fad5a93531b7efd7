"""IPO: a squared distance to a fixed margin of averaged log-ratios (arXiv 2310.12036)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, averages
from oatlite.config.algorithms import IPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class IPO(Algorithm):
    needs = Needs(reference=True)
    Options = IPOConfig

    def __init__(self, options: Any) -> None:
        self.options: IPOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.ipo(*averages(policy, reference), beta=self.options.beta)

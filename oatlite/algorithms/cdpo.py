"""cDPO: DPO for labels of which a known share is wrong."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import CDPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class CDPO(Algorithm):
    needs = Needs(reference=True)
    Options = CDPOConfig

    def __init__(self, options: Any) -> None:
        self.options: CDPOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        options = self.options
        return losses.cdpo(*sums(policy, reference), beta=options.beta, label_smoothing=options.label_smoothing)

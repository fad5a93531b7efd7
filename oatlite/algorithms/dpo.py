"""DPO: the log-ratio to a reference policy is the reward (arXiv 2305.18290)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import DPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class DPO(Algorithm):
    needs = Needs(reference=True)
    Options = DPOConfig

    def __init__(self, options: Any) -> None:
        self.options: DPOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.dpo(*sums(policy, reference), beta=self.options.beta)

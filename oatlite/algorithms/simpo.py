"""SimPO: the average log-probability is the reward, and needs no reference (arXiv 2405.14734)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm
from oatlite.config.algorithms import SimPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class SimPO(Algorithm):
    Options = SimPOConfig

    def __init__(self, options: Any) -> None:
        self.options: SimPOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.simpo(
            policy.chosen / policy.chosen_lengths,
            policy.rejected / policy.rejected_lengths,
            beta=self.options.beta,
            gamma_beta_ratio=self.options.gamma_beta_ratio,
            loss_type=self.options.loss_type,
        )

"""Length-regularized DPO: a longer chosen response is pushed less (arXiv 2403.19159)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import LRDPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class LRDPO(Algorithm):
    needs = Needs(reference=True)
    Options = LRDPOConfig

    def __init__(self, options: Any) -> None:
        self.options: LRDPOConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.lr_dpo(
            *sums(policy, reference),
            beta=self.options.beta,
            length_alpha=self.options.length_alpha,
            chosen_lengths=policy.chosen_lengths,
            rejected_lengths=policy.rejected_lengths,
        )

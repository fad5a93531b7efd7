"""DPO with the likelihood of the chosen response added (arXiv 2404.19733)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import DPOSFTConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class DPOSFT(Algorithm):
    needs = Needs(reference=True)
    Options = DPOSFTConfig

    def __init__(self, options: Any) -> None:
        self.options: DPOSFTConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        return losses.dpo_sft(
            *sums(policy, reference),
            beta=self.options.beta,
            sft_weight=self.options.sft_weight,
            chosen_lengths=policy.chosen_lengths,
        )

"""XPO: DPO on a response of the policy and one of the reference, with optimism (arXiv 2405.21046, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import XPOConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class XPO(Algorithm):
    needs = Needs(reference=True)
    Options = XPOConfig

    def __init__(self, options: Any) -> None:
        self.options: XPOConfig = options

    def sampling_plan(self) -> Sequence[str]:
        return ("policy", "reference")

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        assert batch.chosen_is_reference is not None and batch.rejected_is_reference is not None
        return losses.xpo(
            *sums(policy, reference),
            beta=self.options.beta,
            alpha=self.options.alpha,
            chosen_is_reference=batch.chosen_is_reference,
            rejected_is_reference=batch.rejected_is_reference,
        )

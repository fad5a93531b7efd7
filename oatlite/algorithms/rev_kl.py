"""DPO with the oracle's win probability as its label (arXiv 2409.19605)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs, sums
from oatlite.config.algorithms import RevKLConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class RevKL(Algorithm):
    needs = Needs(reference=True, margins=True)
    Options = RevKLConfig

    def __init__(self, options: Any) -> None:
        self.options: RevKLConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        margins = self.options.margin_scale * batch.margins
        return losses.rev_kl(*sums(policy, reference), beta=self.options.beta, margins=margins)

"""BNF: token by token, feedback that fades on both sides (arXiv 2410.04834)."""

from __future__ import annotations

from typing import Any

from oatlite.algorithms.base import Algorithm, Needs
from oatlite.config.algorithms import BNFConfig
from oatlite.maths import losses
from oatlite.maths.losses import PairLosses
from oatlite.maths.pairs import PairBatch, ResponseLogprobs


class BNF(Algorithm):
    needs = Needs(reference=True, tokens=True)
    Options = BNFConfig

    def __init__(self, options: Any) -> None:
        self.options: BNFConfig = options

    def loss(self, policy: ResponseLogprobs, reference: ResponseLogprobs | None, batch: PairBatch) -> PairLosses:
        assert reference is not None and policy.tokens is not None and reference.tokens is not None
        tokens = policy.tokens
        assert tokens.chosen_entropies is not None and tokens.rejected_entropies is not None
        return losses.bnf(
            tokens.chosen,
            tokens.rejected,
            reference.tokens.chosen,
            reference.tokens.rejected,
            chosen_entropies=tokens.chosen_entropies,
            rejected_entropies=tokens.rejected_entropies,
            chosen_masks=tokens.chosen_masks,
            rejected_masks=tokens.rejected_masks,
        )

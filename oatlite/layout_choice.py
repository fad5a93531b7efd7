"""Which layout of pairs a model takes, found out by trying: the fastest that computes what two plain sequences do."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from oatlite.errors import ConfigError
from oatlite.layouts import ForwardBatch, LayoutName, TokenPair, lay_out
from oatlite.models import PairModel

log = logging.getLogger(__name__)

NUM_TIMED_PAIRS = 4
NUM_TIMED_PASSES = 3


def choose_layout(
    model: PairModel, vocab_size: int, pad_token_id: int, device: torch.device, *, longest: tuple[int, int]
) -> LayoutName:
    """The fastest layout by which the model computes the log-probabilities of ``plain``; that one is said in the log.

    ``longest`` is the length of the longest prompt and of the longest response, in tokens: a model whose attention
    reaches over a window alone may agree on short rows and not on these.
    Raises ConfigError for a model whose logits are not its output head times its last hidden state (scaled or capped
    logits), because the chunked log-probabilities would be wrong for it.
    """
    with torch.no_grad():
        trial = _Trial(model, vocab_size, pad_token_id, device, longest)
        trial.require_plain_head()
        why = ""
        for names in rivals(device, takes_prompt_masks=model.takes_prompt_masks):
            faults = {name: trial.fault(name) for name in names}
            agreeing = [name for name in names if not faults[name]]
            if len(agreeing) > 1:
                times = {name: trial.seconds(name) for name in agreeing}
                log.info("forward of %d pairs: %s", NUM_TIMED_PAIRS, times)
                return min(times, key=times.__getitem__)
            if agreeing:
                return agreeing[0]
            why = faults[names[-1]]
    log.warning("%s takes no shared-prompt mask (%s); using plain sequences", type(model.model).__name__, why)
    return "plain"


def rivals(device: torch.device, *, takes_prompt_masks: bool) -> list[list[LayoutName]]:
    """Groups of layouts, better ones first; within a group the clock decides."""
    if not takes_prompt_masks:
        return [["masked"]]
    return [["shared", "flex"] if device.type == "cuda" else ["shared"], ["masked"]]


class _Trial:
    """Short and long pairs, for which a layout must give what ``plain`` gives."""

    def __init__(
        self, model: PairModel, vocab_size: int, pad_token_id: int, device: torch.device, longest: tuple[int, int]
    ) -> None:
        generator = np.random.default_rng(0)

        def random_pair(*sizes: int) -> TokenPair:
            prompt, chosen, rejected = (generator.integers(0, vocab_size, size).astype(np.int32) for size in sizes)
            return TokenPair(prompt=prompt, chosen=chosen, rejected=rejected)

        self._model, self._pad_token_id, self._device = model, pad_token_id, device
        self._short = [random_pair(9, 4, 6), random_pair(5, 7, 3)]
        self._long = [random_pair(longest[0], longest[1], longest[1])]
        self._expected = self._logprobs(self._short, "plain")
        is_exact = self._expected.dtype == next(model.parameters()).dtype
        self._atol, self._rtol = (1e-4, 1e-4) if is_exact else (0.15, 0.02)

    def _batch(self, pairs: Sequence[TokenPair], name: LayoutName) -> ForwardBatch:
        return lay_out(pairs, name, self._pad_token_id, self._device)

    def _logprobs(self, pairs: Sequence[TokenPair], name: LayoutName) -> torch.Tensor:
        logprobs: torch.Tensor = self._model(self._batch(pairs, name))
        return logprobs

    def _agrees(self, logprobs: torch.Tensor) -> bool:
        return torch.allclose(logprobs, self._expected, atol=self._atol, rtol=self._rtol)

    def require_plain_head(self) -> None:
        batch = self._batch(self._short, "plain")
        model = self._model.model
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        direct = logits[batch.predictor_rows, batch.predictor_columns].float().log_softmax(-1)
        if not self._agrees(direct.gather(1, batch.targets[:, None])[:, 0]):
            raise ConfigError(
                f"the logits of {type(model).__name__} are not its output head times its last hidden state",
                "use a model without scaled or capped logits",
            )

    def fault(self, name: LayoutName) -> str:
        """Why the model does not take this layout; empty if it does."""
        try:
            found = self._logprobs(self._short, name)
            apart = (found - self._expected).abs()
            if self._agrees(found):
                apart = (self._logprobs(self._long, name) - self._logprobs(self._long, "plain")).abs()
                # Rounding in bfloat16 can move one of many tokens far; a window that is cut moves all of them.
                if float(apart.mean()) < self._atol / 3:
                    return ""
            return f"log-probabilities differ by {float(apart.max()):.2g}"
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error).splitlines()[0]

    def seconds(self, name: LayoutName) -> float:
        """The least of a few forward passes over long pairs, after one that compiles what is to be compiled."""

        def once() -> float:
            start = time.perf_counter()
            self._logprobs(self._long * NUM_TIMED_PAIRS, name)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return time.perf_counter() - start

        once()
        return min(once() for _ in range(NUM_TIMED_PASSES))

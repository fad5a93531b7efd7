"""Rewards of two responses to one prompt in one forward pass, in which the prompt is computed once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oatlite.layouts import LayoutName, TokenPair, lay_out
from oatlite.shared_attention import install
from oatlite.sources import first_line

log = logging.getLogger(__name__)


class PrefixScores(nn.Module):
    """Rewards of pairs of sequences that begin alike, each pair in one row that has its beginning once.

    For a decoder with a head called ``score``; the layouts are those of :func:`oatlite.layouts.lay_out`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_prompt_masks = install(model.base_model)

    def forward(self, pairs: Sequence[TokenPair], layout: LayoutName) -> Tensor:
        """Rewards (2 * B,): of the first sequence of each of B pairs and of its second, which may have no token of
        its own and then means nothing."""
        return self.model.score(self.states(pairs, layout))[:, 0]

    def states(self, pairs: Sequence[TokenPair], layout: LayoutName) -> Tensor:
        """The hidden states (2 * B, D) that those rewards are read from."""
        device = self.model.get_input_embeddings().weight.device
        batch = lay_out(pairs, layout, 0, device)
        mask = batch.attention_mask.to(self.model.dtype) if layout != "plain" else batch.attention_mask
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        rows, ends = [], []
        for r, pair in enumerate(pairs):
            start, first, second = len(pair.prompt), len(pair.chosen), len(pair.rejected)
            rows += [r, r] if layout != "plain" else [2 * r, 2 * r + 1]
            ends += [start + first - 1, start + second - 1 + (first if layout != "plain" else 0)]
        return hidden[rows, ends]

    @torch.inference_mode()
    def layout(self, longest: int) -> LayoutName:
        """The fastest one by which the model gives the rewards of plain sequences of up to ``longest`` tokens."""
        rng = np.random.default_rng(0)
        vocab_size = self.model.config.get_text_config().vocab_size
        sizes = [(n // 2, max(1, n // 4), max(1, n // 3)) for n in (min(longest, 16), longest)]
        tokens = [[rng.integers(0, vocab_size, n).astype(np.int32) for n in each] for each in sizes]
        pairs = [TokenPair(prompt=prompt, chosen=one, rejected=other) for prompt, one, other in tokens]
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.05
        why = ""
        try:
            expected = self(pairs, "plain").float()
            for name in ("shared", "masked") if self.takes_prompt_masks else ("masked",):
                found = self(pairs, name).float()
                if torch.allclose(found, expected, atol=tolerance, rtol=tolerance):
                    return name
                why = f"rewards differ by {float((found - expected).abs().max()):.2g}"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = first_line(error)
        log.warning("%s takes no shared prompts (%s); each response is scored alone", type(self.model).__name__, why)
        return "plain"


def in_pairs(prompts: Sequence[str], members: Sequence[int]) -> list[list[int]]:
    """``members`` by prompt, two at a time."""
    by_prompt: dict[str, list[int]] = {}
    for i in members:
        by_prompt.setdefault(prompts[i], []).append(i)
    return [found[n : n + 2] for found in by_prompt.values() for n in range(0, len(found), 2)]


def with_prefix(sequences: Sequence[Sequence[int]]) -> TokenPair:
    """One or two sequences as what they have in common, and what each has of its own, which is one token at least."""
    first, second = np.asarray(sequences[0], np.int32), np.asarray(sequences[-1], np.int32)
    if len(sequences) == 1:
        return TokenPair(prompt=first[:-1], chosen=first[-1:], rejected=first[:0])
    shortest = min(len(first), len(second)) - 1
    differs = np.flatnonzero(first[:shortest] != second[:shortest])
    length = int(differs[0]) if len(differs) else shortest
    return TokenPair(prompt=first[:length], chosen=first[length:], rejected=second[length:])

"""The vocabulary of pairwise losses: what a model and an oracle say about both responses of a batch of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTokens:
    """Single tokens of both responses, each (B, T) and padded with zeros: log-probabilities under one model, masks
    that are 1 on a token and 0 on padding, and the entropy of the model's distribution at each token in nats, without
    gradient, where that was asked for."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_masks: torch.Tensor
    rejected_masks: torch.Tensor
    chosen_entropies: torch.Tensor | None
    rejected_entropies: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogprobs:
    """Log-probabilities (B,) of both responses of each pair under one model, summed over their tokens, and the
    number of those tokens (B,). ``tokens`` is there where the algorithm needs them."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    tokens: PairTokens | None = None

    @classmethod
    def from_tokens(
        cls, logprobs: torch.Tensor, segments: torch.Tensor, num_pairs: int, tokens: PairTokens | None = None
    ) -> ResponseLogprobs:
        """Add up ``logprobs`` (N,) by ``segments`` (N,): 2b is the chosen response of pair b, 2b + 1 the rejected."""
        sums = torch.zeros(2 * num_pairs, dtype=logprobs.dtype, device=logprobs.device)
        sums = sums.index_add(0, segments, logprobs)
        lengths = torch.bincount(segments, minlength=2 * num_pairs)
        return cls(
            chosen=sums[0::2],
            rejected=sums[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            tokens=tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """What is known of B pairs beside their log-probabilities.

    ``margins`` (B,): the oracle's reward of the chosen response minus that of the rejected one; of an oracle that only
    compares, the log-odds of its probability. ``policy_kl`` and ``reference_kl`` (K,): log-probabilities of responses
    of the whole gradient step under prompts that they do not belong to, where the algorithm needs them.
    ``chosen_is_reference`` and ``rejected_is_reference`` (B,), bool: this response was sampled from the reference.
    """

    margins: torch.Tensor
    policy_kl: torch.Tensor | None = None
    reference_kl: torch.Tensor | None = None
    chosen_is_reference: torch.Tensor | None = None
    rejected_is_reference: torch.Tensor | None = None


def pair_tokens(
    logprobs: torch.Tensor, entropies: torch.Tensor | None, segments: torch.Tensor, num_pairs: int
) -> PairTokens:
    """Lay ``logprobs`` (N,), and ``entropies`` (N,) if there are any, out by ``segments`` (N,), as in
    :meth:`ResponseLogprobs.from_tokens`; a segment's tokens stand side by side."""
    lengths = torch.bincount(segments, minlength=2 * num_pairs)
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(len(segments), device=segments.device) - starts[segments]

    def lay_out(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = torch.zeros(2 * num_pairs, int(lengths.max()), dtype=values.dtype, device=values.device)
        grid = grid.index_put((segments, columns), values)
        return grid[0::2], grid[1::2]

    chosen, rejected = lay_out(logprobs)
    chosen_masks, rejected_masks = lay_out(torch.ones_like(logprobs, requires_grad=False))
    chosen_entropies, rejected_entropies = lay_out(entropies) if entropies is not None else (None, None)
    return PairTokens(
        chosen=chosen,
        rejected=rejected,
        chosen_masks=chosen_masks,
        rejected_masks=rejected_masks,
        chosen_entropies=chosen_entropies,
        rejected_entropies=rejected_entropies,
    )

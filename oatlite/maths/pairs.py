"""The vocabulary of pairwise losses: what a model says about both responses of a batch of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogprobs:
    """Log-probabilities (B,) of both responses of each pair under one model, summed over their tokens, and the
    number of those tokens (B,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor

    @classmethod
    def from_tokens(cls, logprobs: torch.Tensor, segments: torch.Tensor, num_pairs: int) -> ResponseLogprobs:
        """Add up ``logprobs`` (N,) by ``segments`` (N,): 2b is the chosen response of pair b, 2b + 1 the rejected."""
        sums = torch.zeros(2 * num_pairs, dtype=logprobs.dtype, device=logprobs.device)
        sums = sums.index_add(0, segments, logprobs)
        lengths = torch.bincount(segments, minlength=2 * num_pairs)
        return cls(chosen=sums[0::2], rejected=sums[1::2], chosen_lengths=lengths[0::2], rejected_lengths=lengths[1::2])

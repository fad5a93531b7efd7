"""Token sequences of many lengths: cut into batches, and padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut ``order``, longest first, so that rows times the first row's length stays within ``batch_tokens``.

    A sequence that is longer than that is a batch of its own.
    """
    cut: list[list[int]] = []
    for i in order:
        longest = lengths[cut[-1][0]] if cut else 0
        if cut and (len(cut[-1]) + 1) * longest <= batch_tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


def longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, T) and their mask of ones and zeros (B, T); what stands in padding means nothing."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()

"""The order in which rows are trained on: drawn by the seed, and rows of like length near each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WINDOW_STEPS = 16  # among whose rows those of like length are put together: more would make steps all too alike


def training_order(lengths: Sequence[int], *, epochs: int, batch_size: int, seed: int) -> list[int]:
    """Indices of rows, each once an epoch; a step trains on the next ``batch_size`` of them.

    Within a step they come by length, so that a forward pass over a part of them has little padding. The order of all
    epochs is laid down beforehand: to go on with a training is then to skip what it has read.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(epochs):
        rows = torch.randperm(len(lengths), generator=generator).tolist()
        steps = []
        for start in range(0, len(rows), _WINDOW_STEPS * batch_size):
            window = sorted(rows[start : start + _WINDOW_STEPS * batch_size], key=lambda row: -lengths[row])
            steps += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        # A step that is not full comes last, or it would shift the others' borders.
        full = [step for step in steps if len(step) == batch_size]
        rest = [row for step in steps if len(step) < batch_size for row in step]
        order += [row for i in torch.randperm(len(full), generator=generator).tolist() for row in full[i]] + rest
    return order

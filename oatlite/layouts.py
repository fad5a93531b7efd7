"""Pairs as rows of one forward pass.

A pair is trained on as one sequence ``[prompt, chosen, rejected]``: both responses start at the position after the
prompt, and a mask hides ``chosen`` from ``rejected``, so the prompt is computed once. Layouts:

- ``shared``: one sequence, with a mask for the positions after the prompt alone (:mod:`oatlite.shared_attention`);
- ``flex``: one sequence, with a mask by blocks for FlexAttention, which skips those that nobody sees (GPUs alone);
- ``masked``: one sequence, with a mask for all positions, where a model's attention cannot be replaced;
- ``plain``: two sequences, for a model whose attention takes none of these masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from oatlite.shared_attention import block_mask

Tokens = npt.NDArray[np.int32]
LayoutName = Literal["shared", "flex", "masked", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Prompt and both responses as token ids, in the order that the loss wants them."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_response_tokens

    @property
    def num_response_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One micro-batch, ready for the model: R rows of L tokens, N response tokens of B pairs.

    ``predictor_rows`` and ``predictor_columns`` (N,) say where the hidden state lies that predicts each response
    token, ``targets`` (N,) which token it is, and ``segments`` (N,) to which response it belongs: 2b for the chosen
    one of pair b, 2b + 1 for the rejected one. ``wants_entropies`` asks for the entropy at each of them too.
    ``is_token`` (R, L), False on padding, asks for the routers' balance over these.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: Any
    predictor_rows: torch.Tensor
    predictor_columns: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor
    num_pairs: int
    wants_entropies: bool = False
    is_token: torch.Tensor | None = None


def lay_out(
    pairs: Sequence[TokenPair],
    layout: LayoutName,
    pad_token_id: int,
    device: torch.device,
    *,
    wants_entropies: bool = False,
    wants_balance: bool = False,
) -> ForwardBatch:
    """Put pairs into rows: one per response (``plain``) or one per pair."""
    rows: list[list[Tokens]] = []
    for pair in pairs:
        if layout == "plain":
            rows += [[pair.prompt, pair.chosen], [pair.prompt, pair.rejected]]
        else:
            rows.append([pair.prompt, pair.chosen, pair.rejected])
    length = max(sum(len(part) for part in row) for row in rows)
    input_ids = np.full((len(rows), length), pad_token_id, np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    part_ids = np.full((len(rows), length), -1, np.int64)
    predictors: list[tuple[int, npt.NDArray[np.int64], Tokens]] = []
    for r, (prompt, *responses) in enumerate(rows):
        end = len(prompt)
        input_ids[r, :end], position_ids[r, :end], part_ids[r, :end] = prompt, np.arange(end), 0
        for s, response in enumerate(responses):
            span = slice(end, end + len(response))
            input_ids[r, span], part_ids[r, span] = response, 1 + s
            position_ids[r, span] = len(prompt) + np.arange(len(response))
            before = np.arange(end - 1, end - 1 + len(response))
            before[:1] = len(prompt) - 1
            predictors.append((r, before, response))
            end += len(response)
    lengths = [len(response) for _, _, response in predictors]
    return ForwardBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        attention_mask=_mask(torch.from_numpy(part_ids).to(device), layout, min(len(pair.prompt) for pair in pairs)),
        predictor_rows=torch.from_numpy(np.repeat([r for r, _, _ in predictors], lengths)).to(device),
        predictor_columns=torch.from_numpy(np.concatenate([before for _, before, _ in predictors])).to(device),
        targets=torch.from_numpy(np.concatenate([t for _, _, t in predictors]).astype(np.int64)).to(device),
        segments=torch.from_numpy(np.repeat(np.arange(len(predictors)), lengths)).to(device),
        num_pairs=len(pairs),
        wants_entropies=wants_entropies,
        is_token=torch.from_numpy(part_ids >= 0).to(device) if wants_balance else None,
    )


def _mask(part_ids: torch.Tensor, layout: LayoutName, shortest_prompt: int) -> Any:
    """The attention mask for rows cut into parts (R, L): 0 the prompt, 1 and 2 responses, -1 padding.

    ``plain`` gives the usual (R, L) mask of ones and zeros, ``masked`` an additive (R, 1, L, L) one, ``shared`` what
    that has after the first ``shortest_prompt`` queries, and ``flex`` a BlockMask of (R, 1, L, L).
    """
    if layout == "plain":
        return (part_ids >= 0).long()
    if layout == "flex":
        return block_mask(part_ids)
    first = shortest_prompt if layout == "shared" else 0
    position = torch.arange(part_ids.shape[1], device=part_ids.device)
    query, key = part_ids[:, first:, None], part_ids[:, None, :]
    visible = ((key == query) | (key == 0)) & (position <= position[first:, None])
    additive = torch.zeros(visible.shape, device=part_ids.device)
    # finfo.min and not -inf: a model in bfloat16 or a fused kernel turns rows of -inf into NaN.
    return additive.masked_fill_(~visible, torch.finfo(torch.bfloat16).min)[:, None]

"""Bradley-Terry on responses that share a prompt: one forward pass, one sequence, several responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from oatlite.continuations import pad_right

_TOLERANCE = 1e-3  # of a reward, between a shared sequence and one of its own


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """Token ids of a prompt and of the responses to it, EOS included; ``wins`` are (better, worse) responses."""

    prompt: list[int]
    responses: list[list[int]]
    wins: Sequence[tuple[int, int]]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest response."""
        return len(self.prompt) + max(map(len, self.responses))

    def num_tokens(self, *, shared: bool) -> int:
        """Tokens that a forward pass over all responses reads."""
        copies = 1 if shared else len(self.responses)
        return copies * len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True, slots=True)
class _Layout:
    """R sequences of T tokens; ``segment`` is 0 on a prompt, from 1 on its responses, -1 on padding.

    ``starts`` says, per ranking and response, where the response begins in the flat (R * T) sequence.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    starts: list[list[int]]


def bradley_terry(
    model: PreTrainedModel, rankings: Sequence[EncodedRanking], *, prefix_weight: float, shared: bool
) -> torch.Tensor:
    """Mean of -log sigmoid(better - worse) over all wins, a scalar.

    With ``prefix_weight`` its mean over the prefixes that end where both texts have gone apart is added, as in
    DeepSpeed-Chat: the loss then reaches the very token that makes the difference. Only texts of equal length are
    compared so, for their tokens stand opposite each other.
    """
    rewards, starts = _token_rewards(model, rankings, shared=shared)
    better_ends: list[int] = []
    worse_ends: list[int] = []
    better_at: list[int] = []
    worse_at: list[int] = []
    weights: list[float] = []
    for ranking, start in zip(rankings, starts, strict=True):
        for better, worse in ranking.wins:
            pair = (ranking.responses[better], ranking.responses[worse])
            better_ends.append(start[better] + len(pair[0]) - 1)
            worse_ends.append(start[worse] + len(pair[1]) - 1)
            if len(pair[0]) != len(pair[1]):
                continue
            apart = range(_common_start(*pair), len(pair[0]))
            better_at.extend(start[better] + i for i in apart)
            worse_at.extend(start[worse] + i for i in apart)
            weights.extend([1.0 / len(apart)] * len(apart))
    loss = -logsigmoid(rewards[better_ends] - rewards[worse_ends]).mean()
    if not prefix_weight or not weights:
        return loss
    prefixes = logsigmoid(rewards[better_at] - rewards[worse_at]) * torch.tensor(weights, device=rewards.device)
    return loss - prefix_weight * prefixes.sum() / sum(weights)


@torch.no_grad()
def count_correct(model: PreTrainedModel, rankings: Sequence[EncodedRanking], *, shared: bool) -> int:
    """How many wins have the higher reward on the better side."""
    ends = _end_rewards(model, rankings, shared=shared)
    return sum(
        bool(rewards[better] > rewards[worse])
        for ranking, rewards in zip(rankings, ends, strict=True)
        for better, worse in ranking.wins
    )


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel, ranking: EncodedRanking) -> bool:
    """Whether responses in one sequence, hidden from each other by a mask, get the rewards they get apart.

    Models with a window, a state or a mask of their own may not honour ours; they read the prompt each time.
    """
    model.eval()
    try:
        together = _end_rewards(model, [ranking], shared=True)[0]
    except (ValueError, RuntimeError, TypeError):
        return False
    apart = _end_rewards(model, [ranking], shared=False)[0]
    return bool((together - apart).abs().max() < _TOLERANCE)


def _end_rewards(model: PreTrainedModel, rankings: Sequence[EncodedRanking], *, shared: bool) -> list[torch.Tensor]:
    rewards, starts = _token_rewards(model, rankings, shared=shared)
    return [
        rewards[[at + len(response) - 1 for at, response in zip(start, ranking.responses, strict=True)]]
        for ranking, start in zip(rankings, starts, strict=True)
    ]


def _token_rewards(
    model: PreTrainedModel, rankings: Sequence[EncodedRanking], *, shared: bool
) -> tuple[torch.Tensor, list[list[int]]]:
    """The reward of every prefix, flat (R * T,), and where each response starts in it."""
    layout = _lay_out(rankings, model.device, shared=shared)
    # Without a mask of our own the model's causal one serves: no real token sees padding on the right.
    mask = _mask(layout.segments, model.dtype) if shared else None
    inputs = {"input_ids": layout.tokens, "position_ids": layout.positions, "attention_mask": mask}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return model.score(hidden)[..., 0].float().flatten(), layout.starts


def _lay_out(rankings: Sequence[EncodedRanking], device: torch.device, *, shared: bool) -> _Layout:
    tokens: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    places: list[list[tuple[int, int]]] = []
    for ranking in rankings:
        num_prompt = len(ranking.prompt)
        place: list[tuple[int, int]] = []
        for index, response in enumerate(ranking.responses):
            if index == 0 or not shared:
                tokens.append(list(ranking.prompt))
                positions.append(list(range(num_prompt)))
                segments.append([0] * num_prompt)
            place.append((len(tokens) - 1, len(tokens[-1])))
            tokens[-1].extend(response)
            positions[-1].extend(range(num_prompt, num_prompt + len(response)))
            segments[-1].extend([index + 1] * len(response))
        places.append(place)
    longest = max(map(len, tokens))
    starts = [[row * longest + column for row, column in place] for place in places]
    return _Layout(
        pad_right(tokens, 0, device), pad_right(positions, 0, device), pad_right(segments, -1, device), starts
    )


def _mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, 1, T, T), added to attention: a token sees what stands before it in its own segment and in the prompt."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    related = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    hidden = ~(causal & related)
    return torch.zeros(hidden.shape, dtype=dtype, device=segments.device).masked_fill(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

"""A Hugging Face model that follows the requests of a running engine, token by token, with a cache of its own.

Requests join and leave at any step, with texts of any length. All that run share one cache whose rows are padded on
the left: those that join are computed together as a batch and then laid beside the others, and from there on each
step computes one token a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from oatlite.errors import ConfigError

TOLERANCE = {torch.float32: 1e-3}
ROUGH_TOLERANCE = 0.5  # of half precision


@dataclass(eq=False, slots=True)
class Running:
    """A request, known by its identity: ``prompt`` and ``response`` are token ids, and the engine lets the latter grow.

    ``coefficients`` say what its distribution is made of (:func:`oatlite.samplers.coefficients`).
    """

    prompt: Sequence[int]
    response: Sequence[int]
    coefficients: tuple[float, float]


class NextTokens:
    """Logits of the next token of each running request.

    It holds keys and values for the longest running text times the number of requests, and forgets a request as soon
    as it is not asked for any more.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        """Raises ConfigError for a model whose cache cannot be continued so: it is tried."""
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._rows: list[Running] = []
        self._lengths: list[int] = []
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._is_token = torch.zeros(0, 0, dtype=torch.bool, device=device)
        self.cache_bytes_per_token = self._try()

    def logits(self, running: Sequence[Running]) -> torch.Tensor:
        """Logits (R, V) of what follows the prompt and the response of each of ``running``, in their order."""
        with torch.no_grad():
            wanted = set(running)
            self._keep([i for i, row in enumerate(self._rows) if row in wanted and self._is_one_behind(i)])
            held = set(self._rows)
            parts = [self._continue()] if self._rows else []
            new = [row for row in running if row not in held]
            if new:
                parts.append(self._join(new))
        place = {row: i for i, row in enumerate(self._rows)}
        return torch.cat(parts)[[place[row] for row in running]]

    def forget(self) -> None:
        """Give the cache's memory back; whoever still runs is computed anew."""
        self._keep([])

    def _is_one_behind(self, i: int) -> bool:
        return len(self._rows[i].prompt) + len(self._rows[i].response) == self._lengths[i] + 1

    def _keep(self, indices: list[int]) -> None:
        """Go on with these rows of the cache alone, and without columns that are padding in all of them."""
        if len(indices) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in indices]
        self._lengths = [self._lengths[i] for i in indices]
        start = self._is_token.shape[1] - max(self._lengths, default=0)
        self._is_token = self._is_token[indices, start:]
        self._keys = [keys[indices, :, start:] for keys in self._keys]
        self._values = [values[indices, :, start:] for values in self._values]

    def _continue(self) -> torch.Tensor:
        from transformers import DynamicCache

        newest = torch.tensor([[row.response[-1]] for row in self._rows], device=self._device)
        self._is_token = F.pad(self._is_token, (0, 1), value=True)
        cache = DynamicCache(list(zip(self._keys, self._values, strict=True)))
        logits = self._forward(newest, self._is_token, cache)
        self._keys, self._values = _contents(cache)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def _join(self, new: list[Running]) -> torch.Tensor:
        from transformers import DynamicCache

        texts = [(*row.prompt, *row.response) for row in new]
        first = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # candidates of a prompt begin alike
        longest = max(map(len, texts))
        ids = torch.tensor([(0,) * (longest - len(text)) + text for text in first], device=self._device)
        is_token = torch.tensor([[i >= longest - len(t) for i in range(longest)] for t in first], device=self._device)
        cache = DynamicCache()
        logits = self._forward(ids, is_token, cache)
        places = [first[text] for text in texts]
        logits, is_token = logits[places], is_token[places]
        keys, values = ([part[places] for part in parts] for parts in _contents(cache))
        if self._rows:
            keys = [_stacked(old, fresh, dim=2) for old, fresh in zip(self._keys, keys, strict=True)]
            values = [_stacked(old, fresh, dim=2) for old, fresh in zip(self._values, values, strict=True)]
            is_token = _stacked(self._is_token, is_token, dim=1)
        self._keys, self._values, self._is_token = keys, values, is_token
        self._rows += new
        self._lengths += map(len, texts)
        return logits

    def _forward(self, ids: torch.Tensor, is_token: torch.Tensor, cache: Any) -> torch.Tensor:
        positions = (is_token.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=is_token.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits.float()

    def _try(self) -> int:
        """Let texts join, grow and leave, and compare with each text computed alone; returns a token's bytes in the
        cache."""
        name, dtype = type(self._model).__name__, next(self._model.parameters()).dtype
        fix = "sample from the policy alone, or give a model of full attention"
        first, second = Running([3, 1, 4, 1, 5], [], (0, 1)), Running([2, 7, 1, 8, 2, 8, 1], [], (0, 1))
        third = Running([1, 6], [], (0, 1))
        try:
            for running in ([first], [first, second], [second, third], [third, second]):
                for row in running:
                    row.response = [*row.response, 9] if row in self._rows else row.response
                found = self.logits(running)
                for row, logits in zip(running, found, strict=True):
                    ids = torch.tensor([[*row.prompt, *row.response]], device=self._device)
                    with torch.no_grad():
                        alone = self._model(input_ids=ids, use_cache=False).logits[0, -1].float()
                    if not torch.allclose(alone, logits, rtol=0.02, atol=TOLERANCE.get(dtype, ROUGH_TOLERANCE)):
                        raise ConfigError(f"the reference's cache cannot be continued for mixtures ({name})", fix)
            num_bytes = sum(part[0].numel() * part.element_size() for part in (*self._keys, *self._values))
            return num_bytes // self._is_token.shape[1]
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            why = f"{name}: {str(error).splitlines()[0]}"
            raise ConfigError(f"the reference cannot be asked token by token for mixtures ({why})", fix) from error
        finally:
            self.forget()


def _contents(cache: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _stacked(one: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of ``one``, then of ``other``, the shorter ones padded at the start of ``dim``."""
    longest = max(one.shape[dim], other.shape[dim])

    def padded(part: torch.Tensor) -> torch.Tensor:
        behind = [0, 0] * (part.dim() - dim - 1)
        return F.pad(part, (*behind, longest - part.shape[dim], 0))

    return torch.cat([padded(one), padded(other)])

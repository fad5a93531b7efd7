"""PairRM as the oracle: a DeBERTa-v2 encoder that reads a prompt and both responses in one go (LLM-Blender, arXiv
2306.02561, section 3), loaded from the names and the layout of the published ``llm-blender/PairRM-hf``.

A sequence is ``[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> response [SEP] [CLS] <|candidate2|> response
[SEP]``. The hidden state at a candidate's prefix, beside that of the source's, goes through the head; the mean over
the head's outputs of candidate 1 less candidate 2 is the logit that candidate 1 is better. As the encoder has a
preference for a place, each pair is read in both orders, and the logit is half the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel

from oatlite.errors import ConfigError
from oatlite.oracles.base import Flags, Floats, PreferenceOracle, Verdicts, bradley_terry
from oatlite.oracles.conversations import as_text
from oatlite.oracles.loading import (
    PAIRRM_MAX_TOKENS,
    PAIRRM_PREFIXES,
    load_tokenizer,
    out_of_memory_told,
    require_finite,
    torch_dtype,
)
from oatlite.oracles.sequences import batches, longest_first, pad
from oatlite.sources import first_line

FIX = "type --oracle pairrm for the published one, or a reward model's folder"


class PairRM(DebertaV2PreTrainedModel):  # type: ignore[misc]  # transformers types it as Any
    """The network, with parameters named as in the published checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, dropout = config.hidden_size, config.drop_out
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prefixes: Tensor) -> Tensor:
        """Logits (B,) that candidate 1 is better; ``prefixes`` (B, 3) are the positions of the three prefix tokens."""
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=hidden.device)
        # In float32, head included: a difference of two numbers in bfloat16 would tie what is close.
        source, first, second = (hidden[rows, prefixes[:, i]].float() for i in range(3))
        left, right = (self.head_layer(torch.cat([source, candidate], dim=-1)) for candidate in (first, second))
        return (left - right).mean(dim=-1)


class PairRMOracle(PreferenceOracle):
    """Compares in batches of at most ``batch_tokens`` padded tokens, the longest sequences first.

    ``max_tokens`` (default: PAIRRM_MAX_TOKENS) counts the prompt, both responses and what stands between them: a pair
    that is longer is not valid. ``dtype`` "auto" is bfloat16 on a GPU and float32 on a CPU. Raises ConfigError when
    ``path``, a folder or a hub id, holds no such model.
    """

    def __init__(
        self,
        path: str,
        *,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.path = path
        self.max_tokens = max_tokens or PAIRRM_MAX_TOKENS
        self.batch_tokens = batch_tokens
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(path)
        try:
            model, info = PairRM.from_pretrained(path, dtype=torch_dtype(dtype, self.device), output_loading_info=True)
        except Exception as error:  # torn weights, a configuration that lacks a field, a failing download
            raise ConfigError(f"PairRM {path} cannot be loaded: {first_line(error)}", FIX) from error
        if info["missing_keys"]:
            raise ConfigError(f"the weights of {path} lack {', '.join(sorted(info['missing_keys'])[:3])}", FIX)
        if info["unexpected_keys"]:
            more = ", ".join(sorted(info["unexpected_keys"])[:3])
            raise ConfigError(f"the weights of {path} hold {more}, which PairRM has no place for", FIX)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.model.head_layer.float()
        self._prefix_ids = [getattr(model.config, name) for name in PAIRRM_PREFIXES]
        self._prefixes = [self.tokenizer.convert_ids_to_tokens(token) for token in self._prefix_ids]
        for token, text in zip(self._prefix_ids, self._prefixes, strict=True):
            ids = [] if text is None else self._ids(f"{text}a")
            if token not in ids[:2]:
                raise ConfigError(f"the tokenizer of PairRM {path} does not know the token {token} ({text})", FIX)

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`. Raises OracleError for a logit that is not a number."""
        del references  # it compares the two alone
        both = [*zip(prompts, first, second, strict=True), *zip(prompts, second, first, strict=True)]
        logits = self._logits(both).reshape(2, len(prompts))
        is_valid: Flags = np.isfinite(logits[0]) & np.isfinite(logits[1])
        halves = (logits / 2).astype(np.float32)
        return Verdicts(
            first_win=np.where(is_valid, bradley_terry(halves[0], halves[1]), np.float32(0.5)), is_valid=is_valid
        )

    @torch.inference_mode()
    def features(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The hidden states at the prefixes of the prompt and of one response, beside each other, (B, 2 H) float32;
        NaN for what is too long."""
        encoded = [self.encode(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        found = np.full((len(encoded), 2 * self.model.config.hidden_size), np.nan, np.float32)
        lengths = [len(ids) for ids, _ in encoded]
        fitting = [i for i in longest_first(lengths) if lengths[i] <= self.max_tokens]
        for batch in batches(fitting, lengths, self.batch_tokens):
            input_ids, mask = pad([encoded[i][0] for i in batch])
            prefixes = torch.tensor([encoded[i][1] for i in batch])
            with out_of_memory_told(f"PairRM {self.path}", self.batch_tokens):
                hidden = self.model.pretrained_model(
                    input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)
                ).last_hidden_state
                states = hidden[torch.arange(len(batch))[:, None], prefixes].flatten(1)
                found[batch] = states.float().cpu().numpy()
            require_finite(found[batch], f"PairRM {self.path} gave states")
        return found

    def encode(self, prompt: str, first: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """The token ids of one order of a pair, or of one response alone, and where in them the prefix tokens stand.
        A conversation is written out."""
        ids: list[int] = []
        prefixes: list[int] = []
        texts = [as_text(prompt), *(text for text in (first, second) if text is not None)]
        for token, prefix, text in zip(self._prefix_ids, self._prefixes, texts, strict=False):
            part = self._ids(prefix + text)
            prefixes.append(len(ids) + part.index(token))
            ids += part
        return ids, prefixes

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _logits(self, triples: Sequence[tuple[str, str, str]]) -> Floats:
        """(B,) float32, NaN for what is too long; each distinct triple is read once."""
        distinct = list(dict.fromkeys(triples))
        encoded = [self.encode(*triple) for triple in distinct]
        lengths = [len(ids) for ids, _ in encoded]
        logits = np.full(len(distinct), np.nan, np.float32)
        order = [i for i in longest_first(lengths) if lengths[i] <= self.max_tokens]
        for batch in batches(order, lengths, self.batch_tokens):
            with out_of_memory_told(f"PairRM {self.path}", self.batch_tokens):
                logits[batch] = self._forward([encoded[i] for i in batch])
            require_finite(logits[batch], f"PairRM {self.path} gave logits")
        index = {triple: i for i, triple in enumerate(distinct)}
        return logits[[index[triple] for triple in triples]]

    @torch.inference_mode()
    def _forward(self, encoded: Sequence[tuple[list[int], list[int]]]) -> Floats:
        input_ids, mask = pad([ids for ids, _ in encoded])
        prefixes = torch.tensor([positions for _, positions in encoded])
        logits = self.model(input_ids.to(self.device), mask.to(self.device), prefixes.to(self.device))
        return logits.float().cpu().numpy()

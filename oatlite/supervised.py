"""Supervised training of a small policy from scratch: what ``oatlite sft --model tiny-llama`` does."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from oatlite.continuations import drop_long, encode, hold_out, join, pad_right
from oatlite.errors import ConfigError
from oatlite.fitting import Report, Schedule, fit, token_batches
from oatlite.output_folder import complete_or_absent
from oatlite.quiet import quiet
from oatlite.tiny import DEFAULT_SHAPE, TinyName, TinyShape, check_positions, new_tiny_model, tiny_config, train_bpe


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedOptions:
    """``prompt_weight`` is the weight of a prompt token's loss where a reference token has 1."""

    model: TinyName
    epochs: int = 3
    lr: float = 1e-3
    batch_tokens: int = 1024
    max_tokens: int = 512
    prompt_weight: float = 0.3
    vocab_size: int = 4096
    shape: TinyShape = DEFAULT_SHAPE
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedResult:
    """``held_out_loss`` is in nats per reference token, EOS included."""

    held_out_loss: float
    num_parameters: int
    num_rows: int
    num_dropped: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: list[int]
    num_prompt: int


def train_policy(
    rows: Sequence[tuple[str, str]], options: SupervisedOptions, output: Path, report: Report
) -> SupervisedResult:
    """Train on (prompt, reference) rows and leave a folder at ``output`` that transformers and vllm load.

    Equal rows, options and thread counts give equal weights. Raises ConfigError when no row fits, StorageError
    when ``output`` cannot be written.
    """
    started = time.monotonic()
    torch.manual_seed(options.seed)
    model, tokenizer = _new(rows, options)
    encoded = [_encode(tokenizer, *row) for row in rows]
    kept = drop_long([len(row.tokens) for row in encoded], options.max_tokens)
    training, held_out = hold_out(len(kept), options.seed)
    examples = [encoded[kept[i]] for i in training]
    weight = options.prompt_weight

    generator = torch.Generator().manual_seed(options.seed)
    lengths = [len(row.tokens) for row in examples]
    batches = [b for _ in range(options.epochs) for b in token_batches(lengths, options.batch_tokens, generator)]
    schedule = Schedule(lr=options.lr)
    fit(model, batches, lambda batch: _loss(model, [examples[i] for i in batch], weight), schedule, report, "policy")
    result = SupervisedResult(
        held_out_loss=_held_out_loss(model, [encoded[kept[i]] for i in held_out], options.batch_tokens),
        num_parameters=model.num_parameters(),
        num_rows=len(examples),
        num_dropped=len(rows) - len(kept),
        seconds=time.monotonic() - started,
    )
    if not math.isfinite(result.held_out_loss):
        raise ConfigError(f"the held-out loss is {result.held_out_loss}: nothing is saved", "lower --lr")
    with quiet(), complete_or_absent(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return result


def _new(
    rows: Sequence[tuple[str, str]], options: SupervisedOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_positions(options.max_tokens, options.shape)
    tokenizer = train_bpe((prompt + join(prompt, text) for prompt, text in rows), options.vocab_size)
    model = new_tiny_model(AutoModelForCausalLM, tiny_config(options.model, tokenizer, options.shape))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, reference: str) -> _Row:
    before, after = encode(tokenizer, prompt, reference)
    return _Row([*before, *after], len(before))


def _loss(model: PreTrainedModel, rows: Sequence[_Row], prompt_weight: float) -> torch.Tensor:
    """Weighted mean of the next-token cross-entropy over a batch, a scalar."""
    # Right padding under a causal mask: no real token sees it, and without a mask the fast attention kernel runs.
    tokens = pad_right([row.tokens for row in rows], 0, model.device)
    weights = pad_right(
        [[prompt_weight] * (row.num_prompt - 1) + [1.0] * (len(row.tokens) - row.num_prompt) for row in rows],
        0.0,
        model.device,
    )
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, rows: Sequence[_Row], batch_tokens: int) -> float:
    total = 0.0
    for batch in token_batches([len(row.tokens) for row in rows], batch_tokens, None):
        chosen = [rows[i] for i in batch]
        num = sum(len(row.tokens) - row.num_prompt for row in chosen)
        total += _loss(model, chosen, 0.0).item() * num
    return total / sum(len(row.tokens) - row.num_prompt for row in rows)

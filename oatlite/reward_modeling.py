"""Training of a reward model on preferences (Bradley-Terry): what ``oatlite reward-model`` does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from oatlite.continuations import drop_long, encode, hold_out, join, pad_right
from oatlite.errors import ConfigError
from oatlite.fitting import Report, Schedule, fit, token_batches
from oatlite.output_folder import complete_or_absent
from oatlite.supervised import load_pretrained, place
from oatlite.tiny import PAD, TinyShape, is_tiny, tiny_config, train_bpe

Pair = tuple[str, str, str]
"""Prompt, chosen and rejected text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOptions:
    """``lr`` defaults by ``model``: 1e-3 from scratch, 1e-5 otherwise. ``steps`` ends training before the epochs do.

    ``shape`` and ``vocab_size`` belong to a network from scratch.
    """

    model: str
    epochs: int = 1
    steps: int | None = None
    lr: float | None = None
    batch_tokens: int = 4096
    max_tokens: int = 512
    vocab_size: int = 4096
    shape: TinyShape = TinyShape()
    prefix_weight: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """``held_out_accuracy``: the share of held-out pairs whose chosen text has the higher reward."""

    held_out_accuracy: float
    num_held_out: int
    num_parameters: int
    num_pairs: int
    num_dropped: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _EncodedPair:
    chosen: list[int]
    rejected: list[int]

    @property
    def num_tokens(self) -> int:
        """Padded tokens of both sequences."""
        return 2 * max(len(self.chosen), len(self.rejected))

    @property
    def num_shared(self) -> int:
        """Tokens at the start that both sequences share; less than either's length, since the texts differ."""
        return len(os.path.commonprefix([self.chosen, self.rejected]))


def pairs_from_references(rows: Sequence[tuple[str, str]], seed: int) -> list[Pair]:
    """Each row's reference against that of another row, drawn by ``seed``; equal references make no pair.

    Raises ConfigError when no pair is left.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    partners = dict(zip(order, [*order[1:], order[0]], strict=True))
    pairs = [(p, join(p, ref), join(p, rows[partners[i]][1])) for i, (p, ref) in enumerate(rows)]
    if not (kept := [pair for pair in pairs if pair[1] != pair[2]]):
        raise ConfigError("all references are equal, so there is nothing to prefer", "bring pairs, or other data")
    return kept


def train_reward_model(pairs: Sequence[Pair], options: RewardOptions, output: Path, report: Report) -> RewardResult:
    """Train on pairs and leave an ``AutoModelForSequenceClassification`` folder with one label at ``output``.

    A text is scored as prompt, response (tokenized apart) and EOS, padded on the right. Equal pairs, options and
    thread counts give equal weights. Raises ConfigError when the model cannot be loaded or no pair fits,
    StorageError when ``output`` cannot be written.
    """
    started = time.monotonic()
    torch.manual_seed(options.seed)
    model, tokenizer = _load(pairs, options)
    encoded = [_encode(tokenizer, pair) for pair in pairs]
    kept = drop_long([pair.num_tokens // 2 for pair in encoded], options.max_tokens)
    training, held_out = hold_out(len(kept), options.seed)
    examples = [encoded[kept[i]] for i in training]

    generator = torch.Generator().manual_seed(options.seed)
    sizes = [pair.num_tokens for pair in examples]
    batches = [b for _ in range(options.epochs) for b in token_batches(sizes, options.batch_tokens, generator)]
    schedule = Schedule(lr=options.lr or (1e-3 if is_tiny(options.model) else 1e-5))

    def loss_of(batch: list[int]) -> torch.Tensor:
        return _loss(model, [examples[i] for i in batch], options.prefix_weight)

    fit(model, batches[: options.steps], loss_of, schedule, report, "reward model")
    result = RewardResult(
        held_out_accuracy=_accuracy(model, [encoded[kept[i]] for i in held_out], options.batch_tokens),
        num_held_out=len(held_out),
        num_parameters=model.num_parameters(),
        num_pairs=len(examples),
        num_dropped=len(pairs) - len(kept),
        seconds=time.monotonic() - started,
    )
    with complete_or_absent(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return result


def _load(pairs: Sequence[Pair], options: RewardOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_tiny(options.model):
        texts = (prompt + text for prompt, *both in pairs for text in both)
        tokenizer = train_bpe(texts, options.vocab_size)
        config = tiny_config(options.model, tokenizer, options.shape)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model, tokenizer = load_pretrained(AutoModelForSequenceClassification, options.model, num_labels=1)
        _give_pad_token(model, tokenizer)
    tokenizer.padding_side = "right"
    return place(model, options.max_tokens), tokenizer


def _give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that padding differs from EOS: the head scores the last token that is not padding, which is EOS."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.config.pad_token_id = tokenizer.pad_token_id


def _encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> _EncodedPair:
    prompt, chosen, rejected = pair
    sequences = (encode(tokenizer, prompt, text) for text in (chosen, rejected))
    return _EncodedPair(*([*before, *after] for before, after in sequences))


def _token_rewards(model: PreTrainedModel, sequences: Sequence[list[int]]) -> torch.Tensor:
    """The reward that each prefix would have if it were the whole, (len(sequences), longest)."""
    # No mask: under a causal one no real token sees right padding.
    tokens = pad_right(sequences, model.config.pad_token_id, model.device)
    return model.score(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)[..., 0].float()


def _rewards(model: PreTrainedModel, pairs: Sequence[_EncodedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and of the rejected texts, each (B,)."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rewards = _token_rewards(model, sequences)
    ends = torch.tensor([[len(sequence) - 1] for sequence in sequences], device=rewards.device)
    chosen, rejected = rewards.gather(1, ends)[:, 0].chunk(2)
    return chosen, rejected


def _loss(model: PreTrainedModel, pairs: Sequence[_EncodedPair], prefix_weight: float) -> torch.Tensor:
    """Bradley-Terry at the ends, and with ``prefix_weight`` its mean over the positions where the texts differ."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rewards = _token_rewards(model, sequences)
    ends = torch.tensor([len(sequence) - 1 for sequence in sequences], device=rewards.device)
    chosen, rejected = rewards.gather(1, ends[:, None])[:, 0].chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    if prefix_weight == 0:
        return loss
    position = torch.arange(rewards.shape[1], device=rewards.device)
    starts = torch.tensor([pair.num_shared for pair in pairs], device=rewards.device)[:, None]
    last = torch.minimum(*ends.chunk(2))[:, None]
    differs = ((position >= starts) & (position <= last)).float()
    margins = torch.sub(*rewards.chunk(2))
    per_pair = (-logsigmoid(margins) * differs).sum(1) / differs.sum(1)
    return loss + prefix_weight * per_pair.mean()


@torch.no_grad()
def _accuracy(model: PreTrainedModel, pairs: Sequence[_EncodedPair], batch_tokens: int) -> float:
    correct = 0
    for batch in token_batches([pair.num_tokens for pair in pairs], batch_tokens, None):
        chosen, rejected = _rewards(model, [pairs[i] for i in batch])
        correct += int((chosen > rejected).sum())
    return correct / len(pairs)

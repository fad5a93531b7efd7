"""Training of a small reward model from scratch: what ``oatlite reward-model --model tiny-llama`` does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from oatlite.continuations import drop_long, encode, hold_out, join
from oatlite.errors import ConfigError
from oatlite.fitting import Report, Schedule, fit, token_batches
from oatlite.output_folder import complete_or_absent
from oatlite.quiet import quiet
from oatlite.reward_loss import EncodedRanking, bradley_terry, can_share_prompts, count_correct
from oatlite.tiny import DEFAULT_SHAPE, TinyName, TinyShape, check_positions, new_tiny_model, tiny_config, train_bpe

_MAX_PAIRS = 4  # in one ranking: more would make the shared sequence long


@dataclass(frozen=True, slots=True)
class Ranking:
    """Some responses to one prompt; ``wins`` holds (better, worse) pairs of indices into ``texts``."""

    prompt: str
    texts: tuple[str, ...]
    wins: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOptions:
    """``prefix_weight`` is the weight of comparing prefixes beside that of comparing whole texts; ``steps`` ends
    training before the epochs do."""

    model: TinyName
    epochs: int = 1
    steps: int | None = None
    lr: float = 1e-3
    prefix_weight: float = 1.0
    batch_tokens: int = 4096
    max_tokens: int = 512
    vocab_size: int = 4096
    shape: TinyShape = DEFAULT_SHAPE
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """``held_out_accuracy``: the share of ``num_held_out`` comparisons whose better text has the higher reward.

    The prompts of held-out comparisons are not trained on.
    """

    held_out_accuracy: float
    num_held_out: int
    num_parameters: int
    num_comparisons: int
    num_dropped: int
    seconds: float


def rank_pairs(pairs: Iterable[tuple[str, str, str]]) -> list[Ranking]:
    """Gather (prompt, chosen, rejected) by prompt, so that a prompt is read once for several comparisons.

    Raises ConfigError when each pair has two equal texts.
    """
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for prompt, chosen, rejected in pairs:
        if chosen != rejected:
            by_prompt.setdefault(prompt, []).append((chosen, rejected))
    if not by_prompt:
        raise ConfigError("both texts of every pair are equal, so there is nothing to prefer", "bring other data")
    return [
        _rank(prompt, found[start : start + _MAX_PAIRS])
        for prompt, found in by_prompt.items()
        for start in range(0, len(found), _MAX_PAIRS)
    ]


def rank_references(rows: Sequence[tuple[str, str]], seed: int) -> list[Ranking]:
    """:func:`reference_pairs` by prompt. Raises ConfigError if all are equal."""
    return rank_pairs(reference_pairs(rows, seed))


def reference_pairs(rows: Sequence[tuple[str, ...]], seed: int) -> list[tuple[str, str, str]]:
    """Of each (prompt, reference) the prompt, the reference and that of another row, drawn by ``seed``."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    partners = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [(prompt, join(prompt, text), join(prompt, rows[partners[i]][1])) for i, (prompt, text) in enumerate(rows)]


def train_reward_model(
    rankings: Sequence[Ranking], options: RewardOptions, output: Path, report: Report
) -> RewardResult:
    """Train on comparisons and leave an ``AutoModelForSequenceClassification`` folder with one label at ``output``.

    A text is scored as prompt, response (tokenized apart) and EOS. Equal rankings, options and thread counts give
    equal weights. Raises ConfigError when no comparison fits, StorageError when ``output`` cannot be
    written.
    """
    started = time.monotonic()
    torch.manual_seed(options.seed)
    model, tokenizer = _new(rankings, options)
    encoded = [_encode(tokenizer, ranking) for ranking in rankings]
    kept = drop_long([ranking.longest for ranking in encoded], options.max_tokens)
    training, held_out = ([encoded[kept[i]] for i in part] for part in hold_out(len(kept), options.seed))

    # The longest one, because attention over a window agrees as long as everything fits into it.
    shared = can_share_prompts(model, max(training, key=lambda ranking: ranking.num_tokens(shared=True)))
    generator = torch.Generator().manual_seed(options.seed)
    sizes = [ranking.num_tokens(shared=shared) for ranking in training]
    batches = [b for _ in range(options.epochs) for b in token_batches(sizes, options.batch_tokens, generator)]
    schedule = Schedule(lr=options.lr)

    def loss_of(batch: list[int]) -> torch.Tensor:
        return bradley_terry(model, [training[i] for i in batch], prefix_weight=options.prefix_weight, shared=shared)

    fit(model, batches[: options.steps], loss_of, schedule, report, "reward model")
    num_held_out = sum(len(ranking.wins) for ranking in held_out)
    sizes = [ranking.num_tokens(shared=shared) for ranking in held_out]
    checked = token_batches(sizes, options.batch_tokens, None)
    num_correct = sum(count_correct(model, [held_out[i] for i in batch], shared=shared) for batch in checked)
    result = RewardResult(
        held_out_accuracy=num_correct / num_held_out,
        num_held_out=num_held_out,
        num_parameters=model.num_parameters(),
        num_comparisons=sum(len(ranking.wins) for ranking in training),
        num_dropped=len(rankings) - len(kept),
        seconds=time.monotonic() - started,
    )
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise ConfigError("the weights are not finite any more: nothing is saved", "lower --lr")
    with quiet(), complete_or_absent(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return result


def _rank(prompt: str, pairs: Iterable[tuple[str, str]]) -> Ranking:
    places: dict[str, int] = {}
    wins = tuple((places.setdefault(a, len(places)), places.setdefault(b, len(places))) for a, b in pairs)
    return Ranking(prompt, tuple(places), wins)


def _new(rankings: Sequence[Ranking], options: RewardOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_positions(options.max_tokens, options.shape)
    texts = (ranking.prompt + text for ranking in rankings for text in ranking.texts)
    tokenizer = train_bpe(texts, options.vocab_size)
    config = tiny_config(options.model, tokenizer, options.shape)
    config.num_labels = 1
    model = new_tiny_model(AutoModelForSequenceClassification, config)
    tokenizer.padding_side = "right"
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, ranking: Ranking) -> EncodedRanking:
    parts = [encode(tokenizer, ranking.prompt, text) for text in ranking.texts]
    return EncodedRanking(parts[0][0], [response for _, response in parts], ranking.wins)

"""``oatlite label``: which of two answers is better, for a file of pairs, by an oracle.

A pair is a row with two answers, or two rows that follow each other, samples 2n and 2n + 1 of one prompt, as
``oatlite generate --num-samples 2`` writes them. What comes out is read by ``oatlite train --offline --preferences``
and by ``oatlite reward-model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oatlite.config.flags import program
from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config
from oatlite.data import is_conversation, load_rows, raw_text
from oatlite.errors import ConfigError, OracleError
from oatlite.fitting import Report
from oatlite.inference.judging import BLOCK, check_models, in_blocks, open_oracle
from oatlite.oracle_checks import try_oracles
from oatlite.oracles import Verdicts, draw_verdicts, trainable_pairs
from oatlite.oracles.base import flipped, reward_margins
from oatlite.output_file import json_lines, require_writable, write_complete

if TYPE_CHECKING:
    from datasets import Dataset

FIRST, SECOND, REFERENCE = "response_a", "response_b", "reference"
VERDICT_DRAWS, FLIP_DRAWS = range(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """``config`` is resolved for inference. A key that is None was not named: its default column may be missing."""

    config: Config
    data: str
    output: Path
    first_key: str | None = None
    second_key: str | None = None
    reference_key: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """B pairs. ``prompts`` are as the data has them; ``num_empty``, ``num_single`` and ``num_equal`` count what is no
    pair: rows that lack a text, samples without a second one, and answers that are the same."""

    prompts: list[Any]
    first: list[str]
    second: list[str]
    references: list[str] | None
    num_empty: int
    num_single: int = 0
    num_equal: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, some: slice) -> Pairs:
        return replace(
            self,
            prompts=self.prompts[some],
            first=self.first[some],
            second=self.second[some],
            references=None if self.references is None else self.references[some],
        )

    @property
    def raw_prompts(self) -> list[str]:
        """As an oracle gets them."""
        return [prompt if isinstance(prompt, str) else raw_text(prompt) for prompt in self.prompts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """How many pairs were written, and left out because they lacked a text, a second sample, a difference, a verdict
    or a preference."""

    num_pairs: int
    num_empty: int
    num_single: int
    num_equal: int
    num_without_verdict: int
    num_tied: int
    num_flipped: int


def label(options: LabelOptions, report: Report) -> Labelled:
    """Judge the pairs and write ``options.output``. Raises OatliteError, also where no pair is left to write.

    Where the oracle fails, or Ctrl-C comes, the pairs that it has answered are written beside it, as they would be
    there, and the error says so.
    """
    config = options.config
    require_writable(options.output, (".jsonl",), overwrite=options.overwrite)
    pairs = read_pairs(options)
    check_models(config)
    try_oracles(config, pairs.raw_prompts[0], None if pairs.references is None else pairs.references[0])
    oracle = open_oracle(config)
    compare = in_blocks(oracle, len(pairs), "label", report)
    answers: list[Verdicts] = []
    try:
        for start in range(0, len(pairs), BLOCK):
            block = pairs.part(slice(start, start + BLOCK))
            answers.append(compare(block.raw_prompts, block.first, block.second, block.references))
    except OracleError as error:
        raise OracleError(
            error.message, "; ".join(filter(None, [error.fix, _keep(pairs, answers, options)]))
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_keep(pairs, answers, options)) from None
    finally:
        oracle.close()
    rows, result = labelled(pairs, Verdicts.joined(answers), config)
    if not rows:
        raise ConfigError(
            f"no pair of {options.data} has a preference: {result.num_equal} are equal, {result.num_tied} tied, and "
            f"{result.num_without_verdict} have no verdict",
            "bring other pairs, or type --feedback bernoulli" if result.num_tied else "bring other pairs",
        )
    write_complete(options.output, json_lines(rows), overwrite=options.overwrite)
    return result


def _keep(pairs: Pairs, answers: Sequence[Verdicts], options: LabelOptions) -> str:
    """Write what the oracle has answered, in place of what an earlier attempt left, and say where that is."""
    if not answers:
        return ""
    verdicts = Verdicts.joined(answers)
    rows, _ = labelled(pairs.part(slice(len(verdicts))), verdicts, options.config)
    path = options.output.with_name(f"{options.output.name}.partial")
    write_complete(path, json_lines(rows), overwrite=True)
    return f"the first {len(verdicts)} of {len(pairs)} pairs were answered, and {len(rows)} are kept in {path}"


def labelled(pairs: Pairs, verdicts: Verdicts, config: Config) -> tuple[list[dict[str, Any]], Labelled]:
    """The rows to write. ``win_probability`` is the chosen answer's and ``margin`` its reward less the other's, or
    of an oracle that only compares the log-odds: low and negative where a verdict was flipped."""
    feedback = config.oracle.feedback
    drawn = draw_verdicts(verdicts.first_win, verdicts.is_valid, feedback, _draws(config, VERDICT_DRAWS))
    is_flipped = flipped(len(drawn), config.oracle.flip_prob, _draws(config, FLIP_DRAWS))
    first_wins = drawn ^ is_flipped
    trainable = trainable_pairs(verdicts, pairs.first, pairs.second, feedback)
    margins = reward_margins(verdicts)
    rows = []
    for b in np.flatnonzero(trainable).tolist():
        sign = 1 if first_wins[b] else -1
        texts = (pairs.first[b], pairs.second[b])[::sign]
        win = float(verdicts.first_win[b])
        row = {
            "prompt": pairs.prompts[b],
            "chosen": texts[0],
            "rejected": texts[1],
            "win_probability": win if first_wins[b] else 1 - win,
            "margin": sign * float(margins[b]),
        }
        if verdicts.first_scores is not None and verdicts.second_scores is not None:
            rewards = (float(verdicts.first_scores[b]), float(verdicts.second_scores[b]))[::sign]
            row |= {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}
        rows.append(row)
    return rows, Labelled(
        num_pairs=len(rows),
        num_empty=pairs.num_empty,
        num_single=pairs.num_single,
        num_equal=pairs.num_equal,
        num_without_verdict=int((~verdicts.is_valid).sum()),
        num_tied=int((verdicts.is_valid & ~trainable).sum()),
        num_flipped=int((is_flipped & trainable).sum()),
    )


def _draws(config: Config, purpose: int) -> np.random.Generator:
    return np.random.default_rng([config.run.seed, purpose])


def read_pairs(options: LabelOptions) -> Pairs:
    """The pairs of a file, with an answer and a prompt each. Raises ConfigError for columns that are not there, and
    where no pair is left."""
    data = options.config.data
    rows = load_rows(options.data, data.split)
    there = rows.column_names
    first, second = options.first_key or FIRST, options.second_key or SECOND
    is_named = options.first_key is not None or options.second_key is not None
    is_sampled = not is_named and not {first, second} <= set(there) and {"response", "sample"} <= set(there)
    answers = ["response"] if is_sampled else [first, second]
    wanted = [data.prompt_key, *answers, *([options.reference_key] if options.reference_key else [])]
    if missing := [key for key in wanted if key not in there]:
        raise ConfigError(
            f"{options.data} has no column {', '.join(missing)}",
            f"its columns are {', '.join(there)}: name them with --prompt-key, --first-key and --second-key",
        )
    if not is_sampled and first == second:
        raise ConfigError(f"both answers are of the column {first}", "name another with --first-key or --second-key")
    reference_key = options.reference_key or (REFERENCE if REFERENCE in there else None)
    references = list(rows[reference_key]) if reference_key else [None] * len(rows)
    prompts = list(rows[data.prompt_key])
    num_single = 0
    if is_sampled:
        found, num_single = _consecutive(rows, prompts, references)
    else:
        found = list(zip(prompts, rows[first], rows[second], references, strict=True))
    return _complete(found, options, num_single)


def _consecutive(
    rows: Dataset, prompts: Sequence[Any], references: Sequence[Any]
) -> tuple[list[tuple[Any, Any, Any, Any]], int]:
    """Samples 2n and 2n + 1 of one prompt, and how many rows are left over."""
    responses, samples = list(rows["response"]), list(rows["sample"])
    if not all(isinstance(sample, int) for sample in samples):
        raise ConfigError(
            "the column sample holds what is no whole number", "number the responses to each prompt from 0"
        )
    numbers = list(rows["row"]) if "row" in rows.column_names else [0] * len(rows)
    found, i = [], 0
    while i + 1 < len(rows):
        follows = samples[i] % 2 == 0 and samples[i + 1] == samples[i] + 1
        if follows and numbers[i] == numbers[i + 1] and prompts[i] == prompts[i + 1]:
            found.append((prompts[i], responses[i], responses[i + 1], references[i]))
            i += 2
        else:
            i += 1
    if not found:
        raise ConfigError(
            "no two samples of one prompt follow each other", f"make them by {program()} generate --num-samples 2"
        )
    return found, len(rows) - 2 * len(found)


def _complete(found: Sequence[tuple[Any, Any, Any, Any]], options: LabelOptions, num_single: int) -> Pairs:
    for prompt, *answers, _ in found:
        if any(answer is not None and not isinstance(answer, str) for answer in answers):
            raise ConfigError(
                f"{options.data} has answers that are no text", "name columns of text with --first-key and --second-key"
            )
        if prompt is not None and not isinstance(prompt, str) and not is_conversation(prompt):
            raise ConfigError(
                f"{options.data} has prompts that are neither text nor lists of messages", "name another --prompt-key"
            )
    kept = [row for row in found if row[0] and row[1] is not None and row[2] is not None]
    if not kept:
        raise ConfigError(f"{options.data} has no row with a prompt and two answers", "bring other data")
    num_complete = len(kept)
    kept = [row for row in kept if row[1] != row[2]]
    if not kept:
        raise ConfigError(f"no pair of {options.data} has a preference: all have two equal answers", "bring other data")
    return Pairs(
        prompts=[row[0] for row in kept],
        first=[row[1] for row in kept],
        second=[row[2] for row in kept],
        references=_references([row[3] for row in kept], options),
        num_empty=len(found) - num_complete,
        num_single=num_single,
        num_equal=num_complete - len(kept),
    )


def _references(texts: Sequence[Any], options: LabelOptions) -> list[str] | None:
    """All of them, or None where none is there or no oracle would read them."""
    found = [text for text in texts if isinstance(text, str) and text]
    is_read = any(kind_of(name) in ("function", "remote") for name in options.config.oracle.path)
    if len(found) < len(texts) and (options.reference_key or (found and is_read)):
        raise ConfigError(
            f"{options.data} lacks text in {options.reference_key or REFERENCE}, in {len(texts) - len(found)} of "
            f"{len(texts)} pairs",
            "leave these rows out, or name another --reference-key",
        )
    return found if len(found) == len(texts) else None

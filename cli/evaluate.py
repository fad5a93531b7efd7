"""``oatlite eval``: the win rate of a model, and its distance from another."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oatlite.errors import ConfigError

from .inference import (
    DATA_KEYS,
    ENGINE_KEYS,
    MODEL,
    ORACLE_KEYS,
    OUTPUT,
    SAMPLING,
    ChatTemplate,
    Gpus,
    JudgeModel,
    JudgeUrl,
    MaxNewTokens,
    MaxPrompts,
    MaxPromptTokens,
    Model,
    Oracle,
    OracleUrl,
    OracleWeights,
    Overwrite,
    PromptKey,
    Prompts,
    ReferenceKey,
    Seed,
    Sets,
    Split,
    TopK,
    TopP,
    settings,
)

if TYPE_CHECKING:
    from oatlite.inference.evaluate import Evaluation


def evaluate(
    ctx: typer.Context,
    model: Model,
    prompts: Prompts,
    against: Annotated[
        str,
        typer.Option(help="references: the dataset's answers; or another model", rich_help_panel=MODEL),
    ] = "references",
    kl_to: Annotated[
        str | None,
        typer.Option(
            help="measure KL to this model too, from one sample per prompt at temperature 1",
            rich_help_panel=MODEL,
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    oracle: Oracle = None,
    oracle_weights: OracleWeights = None,
    oracle_url: OracleUrl = None,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    prompt_key: PromptKey = None,
    reference_key: ReferenceKey = None,
    split: Split = None,
    chat_template: ChatTemplate = None,
    max_prompt_tokens: MaxPromptTokens = None,
    max_prompts: MaxPrompts = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="sample at this temperature; default: greedy, with --best-of-n 0.7",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None,
    best_of_n: Annotated[
        int | None,
        typer.Option(
            help="take the best of so many samples, by the oracle", min=1, rich_help_panel=SAMPLING, show_default=False
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="file for the summary and a row per prompt, .jsonl or .json",
            rich_help_panel=OUTPUT,
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON", rich_help_panel=OUTPUT)] = False,
    gpus: Gpus = None,
    sets: Sets = None,
) -> None:
    """Judge a model's responses by any oracle.

    They are compared with references or with another model's. A win probability over one half is a win, and exactly
    one half, as equal texts have it, half a win.
    """
    if not oracle:
        raise ConfigError("no oracle is given", "add --oracle REWARD_MODEL (a folder or a hub id)")
    is_greedy = temperature is None and (best_of_n or 1) == 1
    for flag, value in (("--top-p", top_p), ("--top-k", top_k)):
        if is_greedy and value is not None:
            raise ConfigError(f"{flag} is for samples, and responses are greedy", "add --temperature")
    reads = (*ENGINE_KEYS, *DATA_KEYS, *ORACLE_KEYS, "sampling", "eval.best_of_n")
    config = settings(ctx.params, sets, reads=reads)
    from oatlite.demo.settings import policy_of
    from oatlite.fitting import console_report
    from oatlite.inference.evaluate import EvalOptions
    from oatlite.inference.evaluate import as_json as to_json
    from oatlite.inference.evaluate import evaluate as run
    from oatlite.inference.signals import stopped_by_signals

    options = EvalOptions(
        config=config,
        against=policy_of(against),
        is_greedy=is_greedy,
        base=None if kl_to is None else policy_of(kl_to),
        output=output,
        overwrite=overwrite,
    )
    with stopped_by_signals(), console_report() as report:
        result = run(options, report)
    if as_json:
        print(json.dumps(to_json(result), ensure_ascii=False))
    else:
        _show(result)
        if output is not None:
            print(f"{output}: the summary and {result.num_prompts} rows")


def _show(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.model} against {result.against}", title_justify="left", show_header=False)
    for name, value in _lines(result):
        table.add_row(name, value)
    Console(file=sys.stdout).print(table)


def _lines(result: Evaluation) -> list[tuple[str, str]]:
    low, high = result.interval
    dropped = f", {result.num_dropped} left out as empty or too long" if result.num_dropped else ""
    unjudged = result.num_prompts - result.num_judged
    found = [
        ("prompts", f"{result.num_prompts}{dropped}" + (f", {unjudged} without a verdict" if unjudged else "")),
        ("win rate", f"{result.win_rate:.1%} (95 %: {low:.1%} to {high:.1%})"),
        ("win probability", f"{result.win_probability:.3f}"),
    ]
    if result.reward is not None and result.opponent_reward is not None:
        found.append(("reward", f"{result.reward:.3f} against {result.opponent_reward:.3f}"))
    found.append(("tokens", f"{result.response_tokens:.1f} against {result.opponent_tokens:.1f}"))
    other = "" if result.opponent_truncated is None else f" against {result.opponent_truncated:.1%}"
    found.append(("not finished", f"{result.truncated:.1%}{other}"))
    if result.kl is not None:
        kl = result.kl
        found.append(("KL per response", f"{kl.per_response:.4f} {_error(kl.per_response_error)} nats"))
        found.append(("KL per token", f"{kl.per_token:.5f} {_error(kl.per_token_error)} nats"))
    return found


def _error(value: float) -> str:
    return "" if math.isnan(value) else f"± {value:.2g}"

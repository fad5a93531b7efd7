"""``oatlite label``: preferences out of a file of pairs, by an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oatlite.errors import ConfigError

from .building import command
from .inference import (
    DATA,
    MACHINE,
    ORACLE_KEYS,
    OUTPUT,
    Feedback,
    FlipProb,
    Gpus,
    JudgeModel,
    JudgeUrl,
    Oracle,
    OracleUrl,
    OracleWeights,
    Overwrite,
    PromptKey,
    Sets,
    Split,
    settings,
)

if TYPE_CHECKING:
    from oatlite.inference.label import Labelled

LABEL_KEYS = ("oracle.feedback", "oracle.flip_prob", "data.prompt_key", "data.split", "data.reference_key")


def label(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="pairs, or what oatlite generate --num-samples 2 wrote: a file, a folder or a hub id",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="file to make, a JSON line for each pair",
            rich_help_panel=OUTPUT,
            metavar="FILE.jsonl",
            show_default=False,
        ),
    ],
    overwrite: Overwrite = False,
    oracle: Oracle = None,
    oracle_weights: OracleWeights = None,
    oracle_url: OracleUrl = None,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    feedback: Feedback = None,
    flip_prob: FlipProb = None,
    split: Split = None,
    prompt_key: PromptKey = None,
    first_key: Annotated[
        str | None,
        typer.Option(help="column of one answer; default: response_a", rich_help_panel=DATA, show_default=False),
    ] = None,
    second_key: Annotated[
        str | None,
        typer.Option(help="column of the other answer; default: response_b", rich_help_panel=DATA, show_default=False),
    ] = None,
    reference_key: Annotated[
        str | None,
        typer.Option(
            help="column of answers for an oracle that reads them; default: reference, if there is one",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="of --feedback bernoulli and --flip-prob; default: 0", rich_help_panel=MACHINE, show_default=False
        ),
    ] = None,
    gpus: Gpus = None,
    sets: Sets = None,
) -> None:
    """Say which of two answers is better, by any oracle.

    It reads a file of pairs: a pair is a row with two answers. In a file with the columns response and sample, as
    oatlite generate writes it, it is two rows that follow each other: samples 0 and 1 of a prompt, 2 and 3, and so on.
    The output is for oatlite train --offline --preferences and for oatlite reward-model. Pairs without a verdict, or
    exactly tied, are left out.
    """
    if not oracle:
        raise ConfigError("no oracle is given", "add --oracle REWARD_MODEL (a folder or a hub id)")
    reads = (*ORACLE_KEYS, *LABEL_KEYS)
    config = settings(ctx.params, sets, reads=reads)
    from oatlite.fitting import console_report
    from oatlite.inference.label import LabelOptions
    from oatlite.inference.label import label as run
    from oatlite.inference.signals import stopped_by_signals

    options = LabelOptions(
        config=config,
        data=data,
        output=output,
        first_key=first_key,
        second_key=second_key,
        reference_key=reference_key,
        overwrite=overwrite,
    )
    with stopped_by_signals(), console_report() as report:
        made = run(options, report)
    print(f"{output}: {made.num_pairs} pairs{_left_out(made)}")
    flags: dict[str, str | Path] = {"--preferences": output, "--model": "POLICY"}
    print(f"next: {command('train', flags, {})} --offline")


def _left_out(made: Labelled) -> str:
    counts = {
        "without a text": made.num_empty,
        "without a second sample": made.num_single,
        "with two equal answers": made.num_equal,
        "without a verdict": made.num_without_verdict,
        "tied": made.num_tied,
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    flipped = f"; {made.num_flipped} verdicts are flipped" if made.num_flipped else ""
    return (f"; left out: {', '.join(found)}" if found else "") + flipped

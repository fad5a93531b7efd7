"""Flags that the commands which build models share, and the commands that they suggest next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from oatlite.config.flags import program

MODEL, DATA, TRAINING = "Model", "Data", "Training"
VOCAB_SIZE = 4096
SMALL = 50_000_000
"""Parameters of a network that needs a higher learning rate than the commands' defaults."""


def _rate(value: float | None) -> float | None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"{value:g} is no learning rate: give one above 0, such as 1e-5")
    return value


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="folder or hub id to start from; tiny-llama or tiny-neox: from scratch",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option(
        "--vocab-size",
        help=f"tokens of a tokenizer from scratch; default: {VOCAB_SIZE}",
        min=258,
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="hub id, saved dataset, or .jsonl .json .csv .parquet file",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option("--split", help="split of the data", rich_help_panel=DATA)]
PromptKey = Annotated[str, typer.Option("--prompt-key", help="column of prompts", rich_help_panel=DATA)]
Epochs = Annotated[int, typer.Option("--epochs", help="passes over the data", min=1, rich_help_panel=TRAINING)]
Rate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="peak learning rate; default: 1e-3 from scratch, 1e-4 with --lora-rank, else 1e-5",
        callback=_rate,
        rich_help_panel=TRAINING,
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="seed of weights and order", min=0, rich_help_panel=TRAINING)]


def command(name: str, flags: Mapping[str, str | Path], defaults: Mapping[str, str]) -> str:
    """``oatlite NAME --flag value ...``, quoted for a shell, without the flags that have their default."""
    words = [name]
    for flag, value in flags.items():
        if str(value) != defaults.get(flag):
            words += [flag, str(value)]
    return f"{program()} {shlex.join(words)}"

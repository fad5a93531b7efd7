"""``oatlite sft``: supervised training of a policy on prompts and reference answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .building import (
    DATA,
    MODEL,
    SMALL,
    TRAINING,
    Data,
    Epochs,
    Model,
    PromptKey,
    Rate,
    Seed,
    Split,
    VocabSize,
    command,
)


def sft(
    model: Model,
    data: Data,
    output: Annotated[
        Path, typer.Option(help="folder to make, for transformers and vllm", rich_help_panel=MODEL, show_default=False)
    ],
    vocab_size: VocabSize = 4096,
    split: Split = "train",
    prompt_key: PromptKey = "prompt",
    reference_key: Annotated[str, typer.Option(help="column of answers", rich_help_panel=DATA)] = "reference",
    max_tokens: Annotated[
        int, typer.Option(help="longer rows are left out, and counted", min=2, rich_help_panel=DATA)
    ] = 512,
    epochs: Epochs = 3,
    lr: Rate = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="padded tokens of one step; default: 1024 from scratch, else 4096",
            min=1,
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    prompt_weight: Annotated[
        float | None,
        typer.Option(
            help="weight of prompt tokens in the loss; default: 0.3 from scratch, else 0",
            min=0.0,
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train a policy on prompts and reference answers."""
    from oatlite.output_folder import require_free

    require_free(output)
    from oatlite.continuations import text_columns
    from oatlite.data import load_rows
    from oatlite.fitting import console_report
    from oatlite.supervised import SupervisedOptions, train_policy

    table = load_rows(data, split)
    rows = text_columns(table, data, [prompt_key, reference_key])
    options = SupervisedOptions(
        model=model,
        epochs=epochs,
        lr=lr,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        prompt_weight=prompt_weight,
        vocab_size=vocab_size,
        seed=seed,
    )
    with console_report() as report:
        result = train_policy([(prompt, reference) for prompt, reference in rows], options, output, report)
    num_empty = len(table) - len(rows)
    empty = f", {num_empty} left out as empty" if num_empty else ""
    dropped = f", {result.num_dropped} left out as too long" if result.num_dropped else ""
    print(
        f"{output}: {result.num_parameters / 1e6:.1f}M parameters, {result.num_rows} rows{empty}{dropped}, "
        f"held-out loss {result.held_out_loss:.3f} nats per reference token, {result.seconds:.0f} s"
    )
    flags: dict[str, str | Path] = {
        "--model": output,
        "--data": data,
        "--output": output.with_name("reward-model"),
        "--split": split,
        "--prompt-key": prompt_key,
        "--reference-key": reference_key,
    }
    if result.num_parameters < SMALL:
        flags["--lr"] = "3e-4"  # the default is for a network of a billion parameters
    defaults = {"--split": "train", "--prompt-key": "prompt", "--reference-key": "reference"}
    print(f"next: {command('reward-model', flags, defaults)}")

"""``oatlite sft``: supervised training of a policy on prompts and reference answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL, DATA, TRAINING = "Model", "Data", "Training"


def sft(
    model: Annotated[
        str,
        typer.Option(
            help="folder or hub id to start from; tiny-llama or tiny-neox: from scratch", rich_help_panel=MODEL
        ),
    ],
    data: Annotated[
        str,
        typer.Option(help="hub id, saved dataset, or .jsonl .json .csv .parquet file", rich_help_panel=DATA),
    ],
    output: Annotated[Path, typer.Option(help="folder to make, for transformers and vllm", rich_help_panel=MODEL)],
    vocab_size: Annotated[
        int, typer.Option(help="tokens of a tokenizer from scratch", min=258, rich_help_panel=MODEL)
    ] = 4096,
    split: Annotated[str, typer.Option(help="split of the data", rich_help_panel=DATA)] = "train",
    prompt_key: Annotated[str, typer.Option(help="column of prompts", rich_help_panel=DATA)] = "prompt",
    reference_key: Annotated[str, typer.Option(help="column of answers", rich_help_panel=DATA)] = "reference",
    max_tokens: Annotated[
        int, typer.Option(help="longer rows are left out, and counted", min=2, rich_help_panel=DATA)
    ] = 512,
    epochs: Annotated[int, typer.Option(help="passes over the data", min=1, rich_help_panel=TRAINING)] = 4,
    lr: Annotated[
        float | None,
        typer.Option(help="peak learning rate; default: 1e-3 from scratch, else 1e-5", rich_help_panel=TRAINING),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="padded tokens of one step", min=1, rich_help_panel=TRAINING)
    ] = 4096,
    prompt_weight: Annotated[
        float | None,
        typer.Option(
            help="weight of prompt tokens in the loss; default: 0.3 from scratch, else 0",
            min=0.0,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and order", min=0, rich_help_panel=TRAINING)] = 0,
) -> None:
    """Train a policy on prompts and reference answers."""
    from oatlite.output_folder import require_free

    require_free(output)
    from oatlite.continuations import text_columns
    from oatlite.data import load_rows
    from oatlite.fitting import console_report
    from oatlite.supervised import SupervisedOptions, train_policy

    rows = text_columns(load_rows(data, split), data, [prompt_key, reference_key])
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
    dropped = f", {result.num_dropped} left out as too long" if result.num_dropped else ""
    print(
        f"{output}: {result.num_parameters / 1e6:.1f}M parameters, {result.num_rows} rows{dropped}, held-out loss "
        f"{result.held_out_loss:.3f} nats per reference token, {result.seconds:.0f} s"
    )
    print(f"next: oatlite reward-model --model {output} --data {data} --output {output.with_name('reward-model')}")

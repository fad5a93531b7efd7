"""``oatlite reward-model``: training of a reward model on preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from oatlite.reward_modeling import Ranking

MODEL, DATA, TRAINING = "Model", "Data", "Training"


def reward_model(
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
    output: Annotated[Path, typer.Option(help="folder to make", rich_help_panel=MODEL)],
    vocab_size: Annotated[
        int, typer.Option(help="tokens of a tokenizer from scratch", min=258, rich_help_panel=MODEL)
    ] = 4096,
    split: Annotated[str, typer.Option(help="split of the data", rich_help_panel=DATA)] = "train",
    prompt_key: Annotated[str, typer.Option(help="column of prompts", rich_help_panel=DATA)] = "prompt",
    chosen_key: Annotated[
        str | None,
        typer.Option(help="column of better answers; default: chosen, if there is one", rich_help_panel=DATA),
    ] = None,
    rejected_key: Annotated[
        str | None,
        typer.Option(help="column of worse answers; default: rejected, if there is one", rich_help_panel=DATA),
    ] = None,
    reference_key: Annotated[
        str,
        typer.Option(help="where there are no such columns: answers, each against another row's", rich_help_panel=DATA),
    ] = "reference",
    max_tokens: Annotated[
        int, typer.Option(help="longer comparisons are left out, and counted", min=2, rich_help_panel=DATA)
    ] = 512,
    epochs: Annotated[int, typer.Option(help="passes over the data", min=1, rich_help_panel=TRAINING)] = 1,
    steps: Annotated[
        int | None, typer.Option(help="stop after this many steps", min=1, rich_help_panel=TRAINING)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="peak learning rate; default: 1e-3 from scratch, else 1e-5", rich_help_panel=TRAINING),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="tokens of one step", min=1, rich_help_panel=TRAINING)] = 4096,
    seed: Annotated[int, typer.Option(help="seed of weights and order", min=0, rich_help_panel=TRAINING)] = 0,
) -> None:
    """Train a reward model on preferences (Bradley-Terry).

    They are two columns, chosen and rejected; where the data has none, each reference against another row's.
    """
    from oatlite.output_folder import require_free

    require_free(output)
    from oatlite.fitting import console_report
    from oatlite.reward_modeling import RewardOptions, train_reward_model

    rankings = _rankings(data, split, prompt_key, (chosen_key, rejected_key), reference_key, seed)
    options = RewardOptions(
        model=model,
        epochs=epochs,
        steps=steps,
        lr=lr,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        vocab_size=vocab_size,
        seed=seed,
    )
    with console_report() as report:
        result = train_reward_model(rankings, options, output, report)
    dropped = f", {result.num_dropped} prompts left out as too long" if result.num_dropped else ""
    print(
        f"{output}: {result.num_parameters / 1e6:.1f}M parameters, {result.num_comparisons} comparisons{dropped}, "
        f"held-out accuracy {result.held_out_accuracy:.3f} on {result.num_held_out}, {result.seconds:.0f} s"
    )
    print(f"next: oatlite train --model {model} --oracle {output} --prompts {data}")


def _rankings(
    data: str,
    split: str,
    prompt_key: str,
    pair_keys: tuple[str | None, str | None],
    reference_key: str,
    seed: int,
) -> list[Ranking]:
    from oatlite.continuations import text_columns
    from oatlite.data import load_rows
    from oatlite.reward_modeling import rank_pairs, rank_references

    rows = load_rows(data, split)
    better, worse = (key or default for key, default in zip(pair_keys, ("chosen", "rejected"), strict=True))
    # Only keys that nobody asked for may be missing.
    if any(pair_keys) or {better, worse} <= set(rows.column_names):
        pairs = text_columns(rows, data, [prompt_key, better, worse])
        return rank_pairs((prompt, chosen, rejected) for prompt, chosen, rejected in pairs)
    answered = text_columns(rows, data, [prompt_key, reference_key])
    return rank_references([(prompt, reference) for prompt, reference in answered], seed)

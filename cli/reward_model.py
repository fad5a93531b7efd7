"""``oatlite reward-model``: training of a reward model on preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from oatlite.reward_modeling import Ranking


def reward_model(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="folder to make", rich_help_panel=MODEL, show_default=False)],
    vocab_size: VocabSize = 4096,
    split: Split = "train",
    prompt_key: PromptKey = "prompt",
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
    epochs: Epochs = 1,
    steps: Annotated[
        int | None,
        typer.Option(help="stop after this many steps", min=1, rich_help_panel=TRAINING, show_default=False),
    ] = None,
    lr: Rate = None,
    batch_tokens: Annotated[int, typer.Option(help="tokens of one step", min=1, rich_help_panel=TRAINING)] = 4096,
    seed: Seed = 0,
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
    flags: dict[str, str | Path] = {
        "--model": "POLICY" if model in ("tiny-llama", "tiny-neox") else model,
        "--oracle": output,
        "--prompts": data,
        "--split": split,
        "--prompt-key": prompt_key,
        "--reference-key": reference_key,
    }
    if result.num_parameters < SMALL:
        flags["--lr"] = "1e-4"  # the default is for a network of a billion parameters
    defaults = {"--split": "train", "--prompt-key": "prompt", "--reference-key": "reference"}
    print(f"next: {command('train', flags, defaults)}")


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

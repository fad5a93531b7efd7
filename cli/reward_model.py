"""``oatlite reward-model``: training of a reward model on preferences."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oatlite.errors import ConfigError

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
from .tuning import (
    SCRATCH,
    BatchSize,
    Dtype,
    EvalEvery,
    EvalSplit,
    Gpus,
    GradientCheckpointing,
    Learners,
    LoraRank,
    MicroBatchSize,
    Resume,
    SaveEvery,
    TuningFlags,
    Wandb,
    ZeroStage,
    left_out,
    prepare,
    refuse,
    refuse_tuning,
    show,
)

if TYPE_CHECKING:
    from oatlite.finetuning.options import TuningOptions
    from oatlite.finetuning.pairs import PairKeys
    from oatlite.reward_modeling import Ranking

OTHER_ORACLES = {
    "judge": "a language model",
    "remote": "a server",
    "pairrm": "PairRM",
    "demo": "the demo's reward model",
}


def reward_model(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="folder to make", rich_help_panel=MODEL, show_default=False)],
    vocab_size: VocabSize = None,
    split: Split = "train",
    eval_split: EvalSplit = None,
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
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="tokens of one step from scratch; default: 4096",
            min=1,
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    lora_rank: LoraRank = None,
    seed: Seed = 0,
    gpus: Gpus = None,
    learners: Learners = None,
    zero_stage: ZeroStage = None,
    dtype: Dtype = None,
    gradient_checkpointing: GradientCheckpointing = False,
    eval_every: EvalEvery = None,
    save_every: SaveEvery = None,
    resume: Resume = False,
    wandb: Wandb = False,
) -> None:
    """Train a reward model on preferences (Bradley-Terry).

    They are two columns, chosen and rejected, of texts or of conversations; where the data has none, each reference
    against another row's.
    """
    from oatlite.output_folder import require_free

    if str(output) in OTHER_ORACLES:
        raise ConfigError(
            f"--oracle {output} means {OTHER_ORACLES[str(output)]}, not a folder of that name",
            f"type --output {output}-model, or another name",
        )
    require_free(output)
    flags = TuningFlags.of(ctx.params)
    keys = _Keys(data, split, prompt_key, (chosen_key, rejected_key), reference_key)
    if model in SCRATCH:
        refuse_tuning(flags.given(), model)
        made = _from_scratch(
            keys,
            output,
            max_tokens,
            {
                "model": model,
                "epochs": epochs,
                "steps": steps,
                "lr": lr,
                "batch_tokens": batch_tokens,
                "vocab_size": vocab_size,
                "seed": seed,
            },
        )
    else:
        refuse({"--vocab-size": vocab_size}, model, "leave it out: the model has a tokenizer")
        refuse({"--batch-tokens": batch_tokens}, model, "give --batch-size, which counts comparisons")
        options = flags.options(
            "reward model", model, epochs=epochs, steps=steps, lr=lr, max_tokens=max_tokens, seed=seed
        )
        made = _tuned(keys, output, options, flags)
    print(
        f"{output}: {made.num_parameters / 1e6:.1f}M parameters, {made.num_comparisons} comparisons{made.left_out}, "
        f"held-out accuracy {made.accuracy:.3f} on {made.num_held_out}, {made.seconds:.0f} s"
    )
    print(f"next: {_next(model, keys, output, made)}")


@dataclass(frozen=True, slots=True)
class _Keys:
    """Where the preferences are; ``pairs`` are the columns of better and worse answers, if they were named."""

    data: str
    split: str
    prompt: str
    pairs: tuple[str | None, str | None]
    reference: str

    def pair_keys(self) -> PairKeys:
        from oatlite.finetuning.pairs import PairKeys

        chosen, rejected = (key or default for key, default in zip(self.pairs, ("chosen", "rejected"), strict=True))
        return PairKeys(
            prompt=self.prompt,
            chosen=chosen,
            rejected=rejected,
            reference=self.reference,
            needs_pairs=any(self.pairs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What there is to say of a training; ``is_chat``: it read conversations."""

    num_parameters: int
    num_comparisons: int
    left_out: str
    accuracy: float
    num_held_out: int
    seconds: float
    is_chat: bool = False


def _from_scratch(keys: _Keys, output: Path, max_tokens: int, given: dict[str, Any]) -> _Made:
    from oatlite.fitting import console_report
    from oatlite.inference.signals import stopped_by_signals
    from oatlite.reward_modeling import RewardOptions, train_reward_model

    rankings = _rankings(keys, given["seed"])
    known = {name: value for name, value in given.items() if value is not None}
    options = RewardOptions(max_tokens=max_tokens, **known)
    with stopped_by_signals(), console_report() as report:
        result = train_reward_model(rankings, options, output, report)
    dropped = f", {result.num_dropped} prompts left out as too long" if result.num_dropped else ""
    return _Made(
        num_parameters=result.num_parameters,
        num_comparisons=result.num_comparisons,
        left_out=dropped,
        accuracy=result.held_out_accuracy,
        num_held_out=result.num_held_out,
        seconds=result.seconds,
    )


def _rankings(keys: _Keys, seed: int) -> list[Ranking]:
    from oatlite.continuations import text_columns
    from oatlite.data import load_rows
    from oatlite.reward_modeling import rank_pairs, rank_references

    rows = load_rows(keys.data, keys.split)
    pair_keys = keys.pair_keys()
    if pair_keys.are_in(rows.column_names):
        pairs = text_columns(rows, keys.data, [keys.prompt, pair_keys.chosen, pair_keys.rejected])
        return rank_pairs((prompt, chosen, rejected) for prompt, chosen, rejected in pairs)
    answered = text_columns(rows, keys.data, [keys.prompt, keys.reference])
    return rank_references([(prompt, reference) for prompt, reference in answered], seed)


def _tuned(keys: _Keys, output: Path, options: TuningOptions, flags: TuningFlags) -> _Made:
    started = time.monotonic()
    tokenizer = prepare(options.task, options.model, options.max_tokens, output, resume=flags.resume)
    from oatlite.finetuning.pairs import pair_rows
    from oatlite.finetuning.run import finetune
    from oatlite.fitting import console_report
    from oatlite.inference.signals import stopped_by_signals

    apart = pair_rows(
        keys.data,
        keys.split,
        flags.eval_split,
        keys.pair_keys(),
        tokenizer,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    with stopped_by_signals(), console_report() as report:
        result = finetune(apart.training, apart.held_out, options, flags.habits(), output, report, resume=flags.resume)
    show(result.notes)
    return _Made(
        num_parameters=result.num_parameters,
        num_comparisons=len(apart.training),
        left_out=left_out(apart.num_empty, apart.num_long),
        accuracy=result.held_out,
        num_held_out=len(apart.held_out),
        seconds=time.monotonic() - started,
        is_chat=apart.is_chat,
    )


def _next(model: str, keys: _Keys, output: Path, made: _Made) -> str:
    flags: dict[str, str | Path] = {
        "--model": "POLICY" if model in SCRATCH else model,
        "--oracle": output,
        **_prompts_of(keys),
    }
    if made.is_chat:
        flags["--set"] = "oracle.chat_template=true"
    if made.num_parameters < SMALL:
        flags["--lr"] = "1e-4"  # the default is for a network of a billion parameters
    defaults = {"--split": "train", "--prompt-key": "prompt", "--reference-key": "reference"}
    return command("train", flags, defaults)


def _prompts_of(keys: _Keys) -> dict[str, str | Path]:
    """The preferences as prompts to train on, where they have any as texts; evaluation compares with the better
    answers, or with the references."""
    from oatlite.data import load_rows

    rows = load_rows(keys.data, keys.split)
    has_texts = keys.prompt in rows.column_names and any(isinstance(prompt, str) for prompt in rows[keys.prompt])
    if not has_texts:
        return {"--prompts": "PROMPTS"}
    pair_keys = keys.pair_keys()
    return {
        "--prompts": keys.data,
        "--split": keys.split,
        "--prompt-key": keys.prompt,
        "--reference-key": pair_keys.chosen if pair_keys.are_in(rows.column_names) else keys.reference,
    }

"""``oatlite sft``: supervised training of a policy on prompts and reference answers, conversations or plain text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def sft(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[
        Path, typer.Option(help="folder to make, for transformers and vllm", rich_help_panel=MODEL, show_default=False)
    ],
    vocab_size: VocabSize = None,
    split: Split = "train",
    eval_split: EvalSplit = None,
    prompt_key: PromptKey = "prompt",
    reference_key: Annotated[str, typer.Option(help="column of answers", rich_help_panel=DATA)] = "reference",
    messages_key: Annotated[
        str | None,
        typer.Option(
            help="column of conversations, trained on what the assistant says; default: messages, if there is one and "
            "no prompt",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option(help="column of texts, trained on as they are", rich_help_panel=DATA, show_default=False),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            help="longer rows are left out, and counted; texts are cut into pieces", min=2, rich_help_panel=DATA
        ),
    ] = 512,
    epochs: Epochs = 3,
    lr: Rate = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="fill rows of --max-tokens with several", rich_help_panel=TRAINING),
    ] = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="padded tokens of one step from scratch; default: 1024",
            min=1,
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    prompt_weight: Annotated[
        float | None,
        typer.Option(
            help="weight of prompt tokens in the loss; default: 0.3 from scratch, else 0 (or 1)",
            min=0.0,
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
    """Train a policy on answers, conversations or plain text."""
    from oatlite.output_folder import require_free

    require_free(output)
    flags = TuningFlags.of(ctx.params)
    rows = _Rows(data, split, prompt_key, reference_key, messages_key, text_key, max_tokens)
    if model in SCRATCH:
        kinds = {"--messages-key": messages_key, "--text-key": text_key, "--packing": packing}
        refuse_tuning({**kinds, **flags.given()}, model)
        made = _from_scratch(
            rows,
            output,
            {
                "model": model,
                "epochs": epochs,
                "lr": lr,
                "batch_tokens": batch_tokens,
                "prompt_weight": prompt_weight,
                "vocab_size": vocab_size,
                "seed": seed,
            },
        )
    else:
        refuse({"--vocab-size": vocab_size}, model, "leave it out: the model has a tokenizer")
        refuse({"--batch-tokens": batch_tokens}, model, "give --batch-size, which counts rows")
        if prompt_weight not in (None, 0.0, 1.0):
            refuse({f"--prompt-weight {prompt_weight:g}": True}, model, "give 0 or 1")
        options = flags.options(
            "policy", model, epochs=epochs, steps=None, lr=lr, max_tokens=max_tokens, packing=packing, seed=seed
        )
        made = _tuned(rows, output, options, flags, trains_on_prompts=prompt_weight == 1.0)
    print(
        f"{output}: {made.num_parameters / 1e6:.1f}M parameters, {made.num_rows} rows{made.left_out}, "
        f"held-out loss {made.loss:.3f} nats per {made.token} token, {made.seconds:.0f} s"
    )
    if made.token == "reference":
        print(f"next: {_next(rows, output, made)}")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows are."""

    data: str
    split: str
    prompt_key: str
    reference_key: str
    messages_key: str | None
    text_key: str | None
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What there is to say of a training; ``token`` is the kind that the loss is over."""

    num_parameters: int
    num_rows: int
    left_out: str
    loss: float
    token: str
    seconds: float


def _from_scratch(rows: _Rows, output: Path, given: dict[str, Any]) -> _Made:
    from oatlite.continuations import text_columns
    from oatlite.data import load_rows
    from oatlite.fitting import console_report
    from oatlite.inference.signals import stopped_by_signals
    from oatlite.supervised import SupervisedOptions, train_policy

    table = load_rows(rows.data, rows.split)
    texts = text_columns(table, rows.data, [rows.prompt_key, rows.reference_key])
    known = {name: value for name, value in given.items() if value is not None}
    options = SupervisedOptions(max_tokens=rows.max_tokens, **known)
    with stopped_by_signals(), console_report() as report:
        result = train_policy([(prompt, reference) for prompt, reference in texts], options, output, report)
    return _Made(
        num_parameters=result.num_parameters,
        num_rows=result.num_rows,
        left_out=left_out(len(table) - len(texts), result.num_dropped),
        loss=result.held_out_loss,
        token="reference",
        seconds=result.seconds,
    )


def _tuned(rows: _Rows, output: Path, options: TuningOptions, flags: TuningFlags, *, trains_on_prompts: bool) -> _Made:
    started = time.monotonic()
    tokenizer = prepare(options.task, options.model, options.max_tokens, output, resume=flags.resume)
    from oatlite.data import load_rows
    from oatlite.finetuning.rows import choose_columns, policy_rows
    from oatlite.finetuning.run import finetune
    from oatlite.fitting import console_report
    from oatlite.inference.signals import stopped_by_signals

    columns = choose_columns(
        load_rows(rows.data, rows.split).column_names,
        prompt_key=rows.prompt_key,
        reference_key=rows.reference_key,
        messages_key=rows.messages_key,
        text_key=rows.text_key,
    )
    apart = policy_rows(
        rows.data,
        rows.split,
        flags.eval_split,
        columns,
        tokenizer,
        max_tokens=options.max_tokens,
        trains_on_prompts=trains_on_prompts,
        seed=options.seed,
    )
    with stopped_by_signals(), console_report() as report:
        result = finetune(apart.training, apart.held_out, options, flags.habits(), output, report, resume=flags.resume)
    show(result.notes)
    return _Made(
        num_parameters=result.num_parameters,
        num_rows=len(apart.training),
        left_out=left_out(apart.num_empty, apart.num_long),
        loss=result.held_out,
        token={"references": "reference", "messages": "assistant", "text": "text"}[columns.kind],
        seconds=time.monotonic() - started,
    )


def _next(rows: _Rows, output: Path, made: _Made) -> str:
    flags: dict[str, str | Path] = {
        "--model": output,
        "--data": rows.data,
        "--output": output.with_name("reward-model"),
        "--split": rows.split,
        "--prompt-key": rows.prompt_key,
        "--reference-key": rows.reference_key,
    }
    if made.num_parameters < SMALL:
        flags["--lr"] = "3e-4"  # the default is for a network of a billion parameters
    defaults = {"--split": "train", "--prompt-key": "prompt", "--reference-key": "reference"}
    return command("reward-model", flags, defaults)

"""Flags for training a model that exists, which ``sft`` and ``reward-model`` share, and what they come to.

A network from scratch is trained by a small loop of its own, which knows few of these flags, and the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from oatlite.errors import ConfigError

from .building import DATA, TRAINING

if TYPE_CHECKING:
    from oatlite.finetuning.options import Habits, Task, TuningOptions

SCRATCH = ("tiny-llama", "tiny-neox")
MACHINE, RUN = "Machine", "Run"
BATCH_SIZE = 32
SAVE_EVERY = 500


def _flag(name: str, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False, **more)


def _switch(name: str, text: str, panel: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=False)


EvalSplit = Annotated[str | None, _flag("--eval-split", "split to evaluate with; default: a twentieth held out", DATA)]
BatchSize = Annotated[int | None, _flag("--batch-size", f"rows of one step; default: {BATCH_SIZE}", TRAINING, min=1)]
MicroBatchSize = Annotated[
    int | None,
    _flag("--micro-batch-size", "rows of one forward pass of a rank; default: up to 8", TRAINING, min=1),
]
LoraRank = Annotated[
    int | None, _flag("--lora-rank", "train a low-rank adapter; default: all weights", TRAINING, min=1)
]
GradientCheckpointing = Annotated[
    bool, _switch("--gradient-checkpointing", "spare memory: compute activations twice", MACHINE)
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    _flag("--dtype", "of forward passes and the output; default: bfloat16 on a GPU, float32 on a CPU", MACHINE),
]
ZeroStage = Annotated[
    int | None, _flag("--zero-stage", "DeepSpeed's, 0 to 3; default: without DeepSpeed", MACHINE, min=0, max=3)
]
Gpus = Annotated[int | None, _flag("--gpus", "GPUs to use, 0: the CPU; default: all there are", MACHINE, min=0)]
Learners = Annotated[
    int | None, _flag("--learners", "processes that train; default: one per GPU, or one", MACHINE, min=1)
]
EvalEvery = Annotated[
    int | None, _flag("--eval-every", "steps between evaluations; default: at the end alone", RUN, min=1)
]
SaveEvery = Annotated[
    int | None, _flag("--save-every", f"steps between checkpoints; default: {SAVE_EVERY}", RUN, min=1)
]
Resume = Annotated[bool, _switch("--resume", "go on from the last checkpoint of the same command", RUN)]
Wandb = Annotated[bool, _switch("--wandb", "log to Weights & Biases", RUN)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningFlags:
    """The flags as they were given; None and False: not given."""

    eval_split: str | None
    batch_size: int | None
    micro_batch_size: int | None
    lora_rank: int | None
    gradient_checkpointing: bool
    dtype: Literal["float32", "bfloat16"] | None
    zero_stage: int | None
    gpus: int | None
    learners: int | None
    eval_every: int | None
    save_every: int | None
    resume: bool
    wandb: bool

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> TuningFlags:
        """Those among a command's parameters."""
        return cls(**{name: parameters[name] for name in cls.__slots__})

    def given(self) -> dict[str, object]:
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in self.__slots__}

    def options(
        self, task: Task, model: str, *, epochs: int, steps: int | None, lr: float | None, max_tokens: int, **more: Any
    ) -> TuningOptions:
        """Raises ConfigError for what does not fit together or is not on this machine."""
        from oatlite.finetuning.options import TuningOptions, place, split_batch
        from oatlite.hardware import gpu_names

        ranks, use_cpu = place(self.gpus, self.learners, len(gpu_names()))
        batch_size = self.batch_size or -(-BATCH_SIZE // ranks) * ranks
        return TuningOptions(
            task=task,
            model=model,
            epochs=epochs,
            steps=steps,
            lr=lr if lr is not None else 1e-4 if self.lora_rank else 1e-5,
            batch_size=batch_size,
            micro_batch_size=split_batch(batch_size, self.micro_batch_size, ranks),
            max_tokens=max_tokens,
            lora_rank=self.lora_rank or 0,
            zero_stage=self.zero_stage,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype or ("float32" if use_cpu else "bfloat16"),
            ranks=ranks,
            use_cpu=use_cpu,
            **more,
        )

    def habits(self) -> Habits:
        from oatlite.finetuning.options import Habits

        return Habits(eval_every=self.eval_every or 0, save_every=self.save_every or SAVE_EVERY, wandb=self.wandb)


def refuse(flags: Mapping[str, object], model: str, fix: str) -> None:
    """Raise ConfigError if one of ``flags``, which are not for ``model``, was given."""
    given = [name for name, value in flags.items() if value is not None and value is not False]
    if given:
        kind = "a network from scratch" if model in SCRATCH else "a model that exists"
        raise ConfigError(f"{given[0]} is not for {kind} (--model {model})", fix)


def refuse_tuning(flags: Mapping[str, object], model: str) -> None:
    """Raise ConfigError if one of ``flags`` was given for a network from scratch."""
    refuse(flags, model, "leave it out, or name a model folder or a hub id")


def left_out(num_empty: int, num_long: int) -> str:
    """What to say of rows that were not used."""
    empty = f", {num_empty} left out as empty" if num_empty else ""
    return empty + (f", {num_long} left out as too long" if num_long else "")


def show(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def prepare(task: Task, model: str, max_tokens: int, output: Path, *, resume: bool) -> Any:
    """The tokenizer of ``model``, once it is known that training can begin. Raises ConfigError."""
    from oatlite.finetuning.run import check_resume

    check_resume(output, resume=resume)
    from oatlite.finetuning.pretrained import check_model, load_tokenizer

    check_model(task, model, max_tokens)
    return load_tokenizer(model)

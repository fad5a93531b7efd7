"""What a training by TRL is told and what it tells, and on how many ranks it runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oatlite.errors import ConfigError

Task = Literal["policy", "reward model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """Everything that the weights depend on, rows apart. ``batch_size`` counts rows (packed ones, with ``packing``)
    of one step over all ranks, ``micro_batch_size`` those of one forward pass of a rank.

    ``steps`` ends training before the epochs do. ``zero_stage`` None means no DeepSpeed.
    """

    task: Task
    model: str
    epochs: int
    steps: int | None = None
    lr: float
    batch_size: int
    micro_batch_size: int
    max_tokens: int
    packing: bool = False
    lora_rank: int = 0
    zero_stage: int | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    ranks: int = 1
    use_cpu: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What no weight depends on: steps between evaluations (0: only at the end) and between checkpoints, and wandb."""

    eval_every: int = 0
    save_every: int = 500
    wandb: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank is told. ``folder`` is where rank 0 puts the model, ``private`` where ranks and parent meet."""

    options: TuningOptions
    habits: Habits
    folder: str
    private: str
    checkpoints: str
    resume_from: str | None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(path: Path) -> RankSpec:
        raw = json.loads(path.read_text())
        options, habits = TuningOptions(**raw.pop("options")), Habits(**raw.pop("habits"))
        return RankSpec(options=options, habits=habits, **raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """``held_out`` is the loss in nats per trained token of a policy, the accuracy of a reward model; ``notes`` are
    lines for a person."""

    held_out: float
    num_parameters: int
    notes: tuple[str, ...] = ()


def split_batch(batch_size: int, micro_batch_size: int | None, ranks: int) -> int:
    """Rows of one forward pass of a rank: as asked, or the largest up to 8 that divides a rank's share of a step.

    Raises ConfigError where a step does not divide.
    """
    if batch_size % ranks:
        raise ConfigError(
            f"--batch-size {batch_size} does not divide by {ranks} ranks",
            f"give a multiple of {ranks}, such as --batch-size {-(-batch_size // ranks) * ranks}",
        )
    share = batch_size // ranks
    if micro_batch_size is None:
        return max(size for size in range(1, min(8, share) + 1) if share % size == 0)
    if share % micro_batch_size:
        raise ConfigError(
            f"--batch-size {batch_size} is no multiple of {ranks} x --micro-batch-size {micro_batch_size}",
            f"give --batch-size {-(-batch_size // (ranks * micro_batch_size)) * ranks * micro_batch_size}",
        )
    return micro_batch_size


def place(gpus: int | None, learners: int | None, num_available: int) -> tuple[int, bool]:
    """How many ranks train, and whether on the CPU: one per GPU, or one on the CPU. Raises ConfigError."""
    if gpus is not None and gpus > num_available:
        there = "there is none" if not num_available else f"there are {num_available}"
        raise ConfigError(f"--gpus {gpus}: {there}", f"give --gpus {num_available}")
    chosen = num_available if gpus is None else gpus
    if chosen and learners is not None and learners > chosen:
        raise ConfigError(f"--learners {learners} is more than {chosen} GPUs", f"give --learners {chosen}, or --gpus 0")
    return learners or max(1, chosen), chosen == 0

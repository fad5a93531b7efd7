"""One rank of a training by TRL, in the command's own process or in one of several."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from oatlite.errors import ConfigError, OatliteError, StorageError, WorkerDied
from oatlite.finetuning.arguments import training_arguments
from oatlite.finetuning.options import RankSpec, TuningResult
from oatlite.finetuning.order import training_order
from oatlite.finetuning.pretrained import load_base
from oatlite.finetuning.ranks import BATCH_S, LOAD_S, count_batch, keep_beating
from oatlite.finetuning.saving import adapter_config, save
from oatlite.finetuning.trainers import Watcher, trainer_class
from oatlite.fitting import Report
from oatlite.metrics.sinks import Sink, WandbSink
from oatlite.quiet import quiet
from oatlite.sources import first_line
from oatlite.stacks import write_stacks_when_asked


def train_rank(
    training: Dataset, held_out: Dataset, spec: RankSpec, report: Report, counts: Callable[[], None] = lambda: None
) -> TuningResult:
    """Train as one of ``spec.options.ranks`` ranks; rank 0 saves the model into ``spec.folder``. ``counts`` is called
    as each batch begins.

    Raises ConfigError, CheckpointError and StorageError.
    """
    notes: list[str] = []
    with quiet(), _sinks(spec, notes.append) as sinks:
        trainer = make_trainer(training, held_out, spec, report, sinks)
        trainer.counts = counts
        try:
            trainer.train(resume_from_checkpoint=spec.resume_from)
        except OSError as error:
            why = error.strerror or first_line(error)
            raise StorageError(f"a checkpoint cannot be written or read: {why}") from error
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the memory of {torch.cuda.get_device_name()} is full",
                "give a lower --micro-batch-size or --max-tokens",
            ) from error
        metric = trainer.measure()
        if not math.isfinite(metric):
            raise ConfigError(f"the held-out loss is {metric}: nothing is saved", "lower --lr")
        for sink in sinks:
            sink.write({"kind": "summary", "held_out": metric})
        num_parameters = save(trainer, spec)
    return TuningResult(held_out=metric, num_parameters=num_parameters, notes=tuple(notes))


@contextlib.contextmanager
def _sinks(spec: RankSpec, warn: Callable[[str], None]) -> Iterator[list[Sink]]:
    """Weights & Biases if asked, of rank 0; what it keeps on disk lies beside the output."""
    if not spec.habits.wandb or int(os.environ.get("RANK", "0")) > 0:
        yield []
        return
    folder = Path(spec.checkpoints).with_suffix(".wandb")
    folder.mkdir(exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", "oatlite")
    is_resumed = spec.resume_from is not None
    sink = WandbSink(project, folder.stem, folder, dataclasses.asdict(spec.options), warn=warn, goes_on=is_resumed)
    try:
        yield [sink]
    finally:
        sink.close()


def make_trainer(
    training: Dataset, held_out: Dataset, spec: RankSpec, report: Report, sinks: Sequence[Sink] = ()
) -> Any:
    from transformers import PrinterCallback

    options = spec.options
    arguments = training_arguments(spec)  # first of all, because ZeRO-3 loads models in parts once they exist
    model, tokenizer = load_base(options)
    callback = Watcher(spec, report, sinks)
    lengths = [max(map(len, row)) for row in zip(*(training[name] for name in training.column_names), strict=True)]
    order = training_order(lengths, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    adapter = {"peft_config": adapter_config(options)} if options.lora_rank else {}
    trainer = trainer_class(options)(
        model=model,
        args=arguments,
        train_dataset=training.select(order),
        processing_class=tokenizer,
        callbacks=[callback],
        **adapter,
    )
    trainer.held_out = list(held_out)
    callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(path: str) -> int:
    """Run one rank of several on a written :class:`RankSpec`; an error goes into a file of its own."""
    spec = RankSpec.read(Path(path))
    private, rank = Path(spec.private), int(os.environ["RANK"])
    write_stacks_when_asked()
    keep_beating(private, rank)

    def report(stage: str, done: int, total: int, figures: str) -> None:
        if rank == 0:
            with (private / "progress.jsonl").open("a") as progress:
                progress.write(json.dumps([stage, done, total, figures]) + "\n")

    try:
        _meet(spec, rank)
        training, held_out = (Dataset.load_from_disk(str(private / name)) for name in ("training", "held-out"))
        result = train_rank(training, held_out, spec, report, lambda: count_batch(private, rank))
        if rank == 0:
            (private / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    except OatliteError as error:
        _tell(error, private / f"error-{rank}.json")
        return error.exit_code
    except Exception as error:  # the libraries' own; a traceback goes into the log
        failure = WorkerDied(f"rank {rank} failed: {type(error).__name__}: {first_line(error)}")
        _tell(failure, private / f"error-{rank}.json")
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _meet(spec: RankSpec, rank: int) -> None:
    """By a file. Left to themselves the libraries meet at a port of rank 0, which listens to the whole network."""
    torch.distributed.init_process_group(
        backend="gloo" if spec.options.use_cpu else "nccl",
        init_method=f"file://{spec.private}/ranks",
        rank=rank,
        world_size=spec.options.ranks,
        timeout=timedelta(seconds=LOAD_S + BATCH_S),  # who keeps the others waiting is told of before they give up
    )


def _tell(error: OatliteError, path: Path) -> None:
    path.write_text(json.dumps({"exit_code": error.exit_code, "message": error.message, "fix": error.fix}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

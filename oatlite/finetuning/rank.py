"""One rank of a training by TRL, in the command's own process or in one of several."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from oatlite.errors import ConfigError, OatliteError, StorageError
from oatlite.finetuning.arguments import training_arguments
from oatlite.finetuning.options import RankSpec, TuningResult
from oatlite.finetuning.order import training_order
from oatlite.finetuning.pretrained import load_base
from oatlite.finetuning.saving import adapter_config, save
from oatlite.finetuning.trainers import Watcher, trainer_class
from oatlite.fitting import Report
from oatlite.sources import first_line

_PR_SET_PDEATHSIG = 1


def train_rank(training: Dataset, held_out: Dataset, spec: RankSpec, report: Report) -> TuningResult:
    """Train as one of ``spec.options.ranks`` ranks; rank 0 saves the model into ``spec.folder``.

    Raises ConfigError, CheckpointError and StorageError.
    """
    with _quiet():
        trainer = make_trainer(training, held_out, spec, report)
        try:
            trainer.train(resume_from_checkpoint=spec.resume_from)
        except OSError as error:
            raise StorageError(
                f"a checkpoint cannot be written or read: {error.strerror or first_line(error)}"
            ) from error
        metric = trainer.measure()
        if not math.isfinite(metric):
            raise ConfigError(f"the held-out loss is {metric}: nothing is saved", "lower --lr")
        num_parameters = save(trainer, spec)
        return TuningResult(held_out=metric, num_parameters=num_parameters)


def make_trainer(training: Dataset, held_out: Dataset, spec: RankSpec, report: Report) -> Any:
    from transformers import PrinterCallback

    options = spec.options
    arguments = training_arguments(spec)  # first of all, because ZeRO-3 loads models in parts once they exist
    model, tokenizer = load_base(options)
    callback = Watcher(spec, report)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings and bars are about their own defaults, which nobody who reads our screen has chosen."""
    import datasets.utils
    from transformers.utils import logging as hf_logging

    level, had_bars = hf_logging.get_verbosity(), not datasets.utils.are_progress_bars_disabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.utils.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
        if had_bars:
            datasets.utils.enable_progress_bars()


def main(path: str) -> int:
    """Run one rank of several on a written :class:`RankSpec`; an error goes into a file of its own."""
    # The elastic launcher puts each rank into a session of its own; without this a rank would outlive it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = RankSpec.read(Path(path))
    private, rank = Path(spec.private), int(os.environ["RANK"])

    def report(stage: str, done: int, total: int, figures: str) -> None:
        if rank == 0:
            with (private / "progress.jsonl").open("a") as progress:
                progress.write(json.dumps([stage, done, total, figures]) + "\n")

    try:
        training, held_out = (Dataset.load_from_disk(str(private / name)) for name in ("training", "held-out"))
        result = train_rank(training, held_out, spec, report)
        if rank == 0:
            (private / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    except OatliteError as error:
        told = {"exit_code": error.exit_code, "message": error.message, "fix": error.fix}
        (private / f"error-{rank}.json").write_text(json.dumps(told))
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

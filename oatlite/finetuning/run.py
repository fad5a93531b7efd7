"""Training of a model that exists, by TRL: what ``sft`` and ``reward-model`` share on this side of the ranks.

Rows arrive as token ids. One rank without ZeRO runs in this process; several are processes of their own, which read
one JSON file, meet by another file in a private folder, and are watched (:mod:`oatlite.finetuning.ranks`). The output
is complete or absent; what a stopped training left to go on from lies beside it, in ``<output>.checkpoints``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oatlite.checkpoint import name_of, read, steps_of, unfinished
from oatlite.errors import CheckpointError, ConfigError, StorageError
from oatlite.finetuning.options import Habits, RankSpec, TuningOptions, TuningResult
from oatlite.finetuning.ranks import run_ranks
from oatlite.fingerprints import digest_of_weights
from oatlite.launcher import LocalLauncher
from oatlite.output_folder import complete_or_absent
from oatlite.quiet import quiet

if TYPE_CHECKING:
    from datasets import Dataset

    from oatlite.fitting import Report
_ORIGIN, _LOCK = "training.json", "lock"
_TORN = "checkpoint-*"  # what transformers writes, until it is complete


def checkpoints_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.checkpoints")


def check_resume(output: Path, *, resume: bool) -> Path | None:
    """The last complete checkpoint that training towards ``output`` left. Raises ConfigError where ``resume`` and what
    is there do not fit."""
    folder = checkpoints_of(output)
    if folder.exists() and not _is_ours(folder):
        raise ConfigError(f"{folder} is in the way: checkpoints would go there", "move it, or give another --output")
    found = steps_of(folder)
    if resume and not found:
        raise ConfigError(f"{folder} has no complete checkpoint to go on from", "leave --resume out")
    if found and not resume:
        raise ConfigError(
            f"{folder} has checkpoints of a training that was stopped", "type --resume to go on, or remove that folder"
        )
    return folder / name_of(found[0]) if found else None


def _is_ours(folder: Path) -> bool:
    """Whether nothing lies in it but what a training leaves, torn checkpoints included."""
    if not folder.is_dir() or (folder / _ORIGIN).is_file():
        return folder.is_dir()
    complete = (folder / name_of(step) for step in steps_of(folder))
    return set(folder.iterdir()) <= {folder / _LOCK, *complete, *unfinished(folder), *folder.glob(_TORN)}


def finetune(
    training: Dataset,
    held_out: Dataset,
    options: TuningOptions,
    habits: Habits,
    output: Path,
    report: Report,
    *,
    resume: bool = False,
) -> TuningResult:
    """Train ``options.model`` and leave at ``output`` a folder that transformers and vllm load, with its tokenizer.

    Rows of a policy have ``input_ids`` and ``labels`` (-100: no loss), those of a reward model ``chosen_ids`` and
    ``rejected_ids``. Equal rows, options and thread counts give equal weights on a CPU, also when ``resume`` goes on
    with a training that was stopped. Raises ConfigError, CheckpointError for a damaged checkpoint, StorageError where
    a disk refuses, WorkerDied when a rank is lost, DeadlineExceeded when one gives no sign of life.
    """
    checkpoints = checkpoints_of(output)
    last = check_resume(output, resume=resume)
    weights = digest_of_weights(options.model)
    origin = {**dataclasses.asdict(options), "rows": _fingerprint(training), "weights": weights}
    if last is not None:
        _check_origin(checkpoints, origin)
    is_trained = False
    with _held(checkpoints):
        try:
            (checkpoints / _ORIGIN).write_text(json.dumps(origin))
            if last is not None:
                _verify(last)
            for path in checkpoints.glob(_TORN):
                shutil.rmtree(path)
            # Within the checkpoints, so that a training that is killed leaves one folder and no other.
            model = checkpoints / "model"
            shutil.rmtree(model, ignore_errors=True)
            with LocalLauncher("oatlite-") as launcher:
                spec = RankSpec(
                    options=options,
                    habits=habits,
                    folder=str(model),
                    private=str(launcher.private_dir),
                    checkpoints=str(checkpoints),
                    resume_from=None if last is None else str(last),
                )
                result = _run(_packed(training, options), held_out, spec, launcher, report)
            is_trained = True
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise StorageError(f"{output} was made by somebody else meanwhile", f"the trained model is in {model}")
            with complete_or_absent(output) as folder:
                for path in model.iterdir():
                    path.rename(folder / path.name)
        except OSError as error:
            raise StorageError(f"cannot write beside {output}: {error.strerror or error}") from error
        finally:
            if not is_trained and not steps_of(checkpoints):
                shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


@contextmanager
def _held(checkpoints: Path) -> Iterator[None]:
    """Keep every other training out of the folder; the lock ends with this process, however that ends."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = (checkpoints / _LOCK).open("w")
    except OSError as error:
        raise StorageError(f"cannot write beside {checkpoints}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a training towards {checkpoints} is going on", "give another --output") from None
        yield


def _verify(checkpoint: Path) -> None:
    """Raises CheckpointError naming the file that is not what was written."""
    try:
        read(checkpoint).verify()
    except CheckpointError as error:
        older = "to go on from the checkpoint before it" if len(steps_of(checkpoint.parent)) > 1 else "to start anew"
        raise CheckpointError(error.message, f"remove {checkpoint} {older}") from error


def _packed(rows: Dataset, options: TuningOptions) -> Dataset:
    if not options.packing:
        return rows
    from trl import pack_dataset

    with quiet():
        return pack_dataset(rows, options.max_tokens, "bfd")


def _fingerprint(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _check_origin(checkpoints: Path, origin: dict[str, Any]) -> None:
    try:
        before = json.loads((checkpoints / _ORIGIN).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoints / _ORIGIN} cannot be read", "remove that folder and start anew") from error
    differs = sorted(key for key in origin if before.get(key) != origin[key])
    if differs:
        key = differs[0]
        was = f"{key} = {before.get(key)}, and not {origin[key]}"
        if key in ("rows", "weights"):
            was = f"other {key}"
        raise ConfigError(
            f"{checkpoints} is of a training with {was}", "repeat its command with --resume, or remove that folder"
        )


def _run(training: Dataset, held_out: Dataset, spec: RankSpec, launcher: LocalLauncher, report: Report) -> TuningResult:
    import torch

    options = spec.options
    if options.ranks == 1 and options.zero_stage is None and (options.use_cpu or torch.cuda.device_count() == 1):
        from oatlite.finetuning.rank import train_rank

        return train_rank(training, held_out, spec, report)
    private = Path(spec.private)
    with quiet():
        training.save_to_disk(private / "training")
        held_out.save_to_disk(private / "held-out")
    run_ranks(spec, launcher, report)
    return TuningResult(**json.loads((private / "result.json").read_text()))

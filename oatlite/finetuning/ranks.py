"""Ranks of a training as processes: started, watched, and told of by who was the first to fail, and where its log is.

A rank gives a sign of life each second, by touching a file. One that gives none, because somebody stopped it, would
leave its peers waiting in a collective, and with one rank for ever. So would one whose main thread hangs, in a driver
or on a dead disk, and whose other threads go on: the main thread adds a byte to a file of its own as each batch begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oatlite.checkpoint import steps_of
from oatlite.errors import BY_EXIT_CODE, DeadlineExceeded, OatliteError, WorkerDied
from oatlite.stacks import ask_for_stacks

if TYPE_CHECKING:
    from oatlite.finetuning.options import RankSpec, TuningOptions
    from oatlite.fitting import Report
    from oatlite.launcher import LocalLauncher, Worker

POLL_S = 0.1
BEAT_S = 1.0
SILENCE_S = 60.0
START_S = 900.0
"""Until the first sign of life, which comes after the libraries are loaded."""
BATCH_S = 1800.0
"""For a batch, and what is saved after it."""
LOAD_S = 7200.0
"""Until the first batch: a model may have to be downloaded first."""


def run_ranks(spec: RankSpec, launcher: LocalLauncher, report: Report) -> None:
    """Start the ranks of ``spec`` and pass on what rank 0 reports, until all have ended well. Raises what a rank
    raised, WorkerDied for one that was lost, DeadlineExceeded for one that is silent."""
    private = Path(spec.private)
    spec.write(private / "spec.json")
    command = [sys.executable, "-m", "oatlite.finetuning.rank", str(private / "spec.json")]
    workers = [
        launcher.start(command, _environment(spec.options, rank), private / f"rank-{rank}.log")
        for rank in range(spec.options.ranks)
    ]
    started, num_read = time.time(), 0
    while True:
        codes = [worker.exit_code() for worker in workers]
        lines = _lines(private / "progress.jsonl")
        for line in lines[num_read:]:
            report(*json.loads(line))
        num_read = len(lines)
        if any(codes):
            break
        if None not in codes:
            return
        frozen = _frozen(private, [rank for rank, code in enumerate(codes) if code is None], started)
        if frozen is not None:
            ask_for_stacks(workers)
            rank, why = frozen
            raise DeadlineExceeded(f"rank {rank} {why}", _fix(spec, workers[rank]))
        time.sleep(POLL_S)
    launcher.stop_all()  # they wait for one another; what they still write is written then
    raise _first_failure(spec, workers, codes)


def keep_beating(private: Path, rank: int) -> None:
    """Touch the file that says that ``rank`` lives, for as long as its process does."""
    path = _beat(private, rank)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the folder goes with the launcher
            while True:
                path.touch()
                time.sleep(BEAT_S)

    threading.Thread(target=beat, daemon=True).start()


def count_batch(private: Path, rank: int) -> None:
    """The main thread of ``rank`` begins one more, in training or evaluation."""
    with _batches(private, rank).open("ab") as file:
        file.write(b".")


def _beat(private: Path, rank: int) -> Path:
    return private / f"beat-{rank}"


def _batches(private: Path, rank: int) -> Path:
    return private / f"batches-{rank}"


def _frozen(private: Path, running: Sequence[int], started: float) -> tuple[int, str] | None:
    """A rank that does not go on, and since when. Whoever began the fewest batches keeps the others waiting."""
    for rank in running:
        if _is_late(_beat(private, rank), started, START_S, SILENCE_S):
            return rank, f"was silent for {SILENCE_S:.0f} s"
    last = min(running, key=lambda rank: _size(_batches(private, rank)))
    if not _is_late(_batches(private, last), started, LOAD_S, BATCH_S):
        return None
    bound_s, what = (BATCH_S, "another") if _size(_batches(private, last)) else (LOAD_S, "a first")
    return last, f"has not begun {what} batch for {bound_s:.0f} s"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_late(path: Path, started: float, first_s: float, next_s: float) -> bool:
    """Whether ``path`` is not there after ``first_s``, or was not touched for ``next_s``."""
    try:
        return time.time() - path.stat().st_mtime > next_s
    except FileNotFoundError:
        return time.time() - started > first_s


def _first_failure(spec: RankSpec, workers: Sequence[Worker], codes: Sequence[int | None]) -> OatliteError:
    """A rank that was killed, or stopped for a reason of its own, takes others down, whose connections break.

    ``codes`` are those of the moment when one had failed.
    """
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return WorkerDied(f"rank {rank} was killed by {name}", _fix(spec, workers[rank]))
    told = [_error(json.loads(path.read_text())) for path in sorted(Path(spec.private).glob("error-*.json"))]
    if told:
        return next((error for error in told if not isinstance(error, WorkerDied)), told[0])
    rank = next(rank for rank, code in enumerate(codes) if code)
    return WorkerDied(f"rank {rank} ended with code {codes[rank]}", _fix(spec, workers[rank]))


def _fix(spec: RankSpec, worker: Worker) -> str:
    """Where its log is, which stays when the private folder goes; and how to go on."""
    descriptor, log = tempfile.mkstemp(prefix="oatlite-", suffix=".log")
    os.close(descriptor)
    shutil.copyfile(worker.log, log)
    is_saved = bool(steps_of(Path(spec.checkpoints)))
    return f"log: {log}; " + ("to go on, type the same with --resume" if is_saved else "nothing was saved before")


def _environment(options: TuningOptions, rank: int) -> dict[str, str]:
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    # By these the libraries know that there are several ranks; what is on one machine has the same local numbers.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.ranks, "LOCAL_WORLD_SIZE": options.ranks}
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        **loopback,
        **{name: str(number) for name, number in numbers.items()},
        "PYTHONPATH": path,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _lines(path: Path) -> list[str]:
    """The complete lines of a file that grows."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _error(told: dict[str, Any]) -> OatliteError:
    return BY_EXIT_CODE.get(told["exit_code"], WorkerDied)(told["message"], told["fix"])

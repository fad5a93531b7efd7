"""What a run leaves on disk and shows to people; only learner rank 0 keeps it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oatlite.errors import StorageError
from oatlite.metrics.records import Kind, make_record
from oatlite.metrics.sinks import JsonlSink, Sink
from oatlite.workers.lifeline import Lifeline

log = logging.getLogger(__name__)


class Journal:
    """``metrics.jsonl``, ``samples.jsonl``, ``eval/`` and what the screen shows of them."""

    def __init__(
        self, run_dir: Path, lifeline: Lifeline, more_sinks: Sequence[Sink] = (), *, resumed_step: int | None = None
    ) -> None:
        """A run that resumes after ``resumed_step`` makes later steps again: what is there of them goes first."""
        self._eval_dir = run_dir / "eval"
        self._eval_dir.mkdir(exist_ok=True)
        if resumed_step is not None:
            cut_after(run_dir, resumed_step)
        self._lifeline = lifeline
        self._sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl"), *more_sinks]
        self._samples = JsonlSink(run_dir / "samples.jsonl")

    def record(self, kind: Kind, *, perf: Mapping[str, Any], **metrics: Any) -> None:
        record = make_record(kind, perf=perf, **metrics)
        for sink in self._sinks:
            sink.write(record)
        self._lifeline.record(kind, record)

    def note(self, line: str) -> None:
        """Something that a person should read once."""
        log.warning(line)
        self._lifeline.record("note", {"text": line})

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Each row is a pair: step, prompt, chosen, rejected, win_probability and what else is known of it."""
        for row in rows:
            self._samples.write(row)
        if rows:
            self._lifeline.record("pair", {key: _short(value) for key, value in rows[0].items()})

    def evaluation(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self._eval_dir / f"step-{step:06d}.jsonl"
        try:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "free space on that disk") from error

    def close(self) -> None:
        self._samples.close()
        for sink in self._sinks:
            sink.close()


def cut_after(run_dir: Path, step: int) -> None:
    """Remove records, samples and evaluations of later steps. Raises StorageError if the disk refuses."""
    try:
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut_lines(run_dir / name, step)
        for path in (run_dir / "eval").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
    except OSError as error:
        raise StorageError(f"cannot write in {run_dir}: {error.strerror}") from error


def _cut_lines(path: Path, step: int) -> None:
    """Cut a file of JSON lines where the first one of a later step, or one that is torn, begins."""
    if not path.exists():
        return
    end = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
        file.truncate(end)


def _short(value: Any) -> Any:
    return value[:4000] if isinstance(value, str) else value

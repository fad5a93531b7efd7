"""Where records go: a file of JSON lines, and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from oatlite.errors import StorageError

LOGGER = logging.getLogger(__name__)
WANDB_CLOSE_S = 10.0
WANDB_BACKLOG = 1000


class Sink(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, with the system before :meth:`write` returns, in the record's own order of keys.

    Appends; half a line that a killed run left behind is cut off first. Raises :class:`StorageError` when the file
    cannot be opened or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("a+b")
            self._cut_torn_line()
        except OSError as error:
            raise StorageError(f"cannot open {self.path}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode("utf-8", errors="replace"))
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}", "free space on that disk") from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}", "free space on that disk") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        size = end = self._file.seek(0, 2)
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        self._file.seek(0, 2)


class WandbSink:
    """Weights & Biases, kept out of training's way.

    It runs in a process of its own (:mod:`oatlite.metrics.wandb_process`), because wandb can hang, also at exit:
    nothing is ever raised, the first failure becomes one warning, and :meth:`close` takes at most ten seconds, after
    which that process is killed. ``WANDB_MODE=offline`` keeps everything under ``dir``, where ``wandb.log`` is too.
    With ``goes_on`` it goes on under the id of the run that lies in ``dir`` already.
    """

    def __init__(
        self,
        project: str,
        name: str,
        dir: Path | str,
        config: Mapping[str, Any],
        *,
        warn: Callable[[str], None] = LOGGER.warning,
        close_s: float = WANDB_CLOSE_S,
        goes_on: bool = True,
    ) -> None:
        self._warn = warn
        self._close_s = close_s
        self._has_failed = False
        self._log = Path(dir) / "wandb.log"
        self._lines: queue.Queue[bytes | None] = queue.Queue(WANDB_BACKLOG)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        try:
            start = {"project": project, "name": name, "dir": str(dir), "config": dict(config)}
            before = _run_before(Path(dir)) if goes_on else {}
            self._put(start | before | {"learner": os.getpid(), "close_s": close_s})
            with self._log.open("ab") as log:
                # Its own session, so that Ctrl-C leaves it alone until close(). So has wandb-core, which no killpg
                # reaches: it ends by itself when it sees its parent gone.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "oatlite.metrics.wandb_process"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, TypeError, ValueError) as error:
            self._fail(str(error))
            return
        # A pipe to a process that hangs fills up, and a write to it blocks: a thread does the writing.
        self._thread = threading.Thread(target=self._feed, args=(self._process,), name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if not self._has_failed:
            try:
                self._put(record)
            except (TypeError, ValueError) as error:
                self._fail(str(error))

    def close(self) -> None:
        if self._process is None or self._thread is None:
            return
        start = time.monotonic()
        deadline = start + self._close_s
        try:
            self._lines.put(None, timeout=self._close_s)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._process.wait(max(0.0, deadline - time.monotonic())) != 0:
                self._fail(self._last_words())
        except (queue.Full, subprocess.TimeoutExpired):
            self._fail(f"it did not finish within {self._close_s:g} s")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._thread = None
        LOGGER.info("Weights & Biases was closed in %.1f s", time.monotonic() - start)

    def _put(self, record: Mapping[str, Any]) -> None:
        try:
            self._lines.put_nowait(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        except queue.Full:
            self._fail("it takes no more records")

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                while (line := self._lines.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except OSError:
            self._fail(self._last_words())

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "its process ended"

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            reason = " ".join(reason.split())[:300]
            self._warn(f"Weights & Biases: {reason}; training goes on, see {self._log}")


def _run_before(dir: Path) -> dict[str, str]:
    """What wandb needs to go on with the newest run that lies under ``dir``: it names them ``run-DATE-ID``."""
    latest = dir / "wandb" / "latest-run"
    return {"id": latest.resolve().name.rpartition("-")[2], "resume": "allow"} if latest.exists() else {}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

"""A run of ``oatlite`` that goes on while a test disturbs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from runs import DEADLINE_S, leftovers, start_command, worker_pids

CLEAN_S = 30.0


class Live:
    """The process of a run in ``folder``, and the lines that it has said so far."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []
        self._num_read = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, *words: str, seconds: float = DEADLINE_S) -> str:
        """The next line that holds all ``words``, after the one that was waited for before."""
        found: list[str] = []

        def is_there() -> bool:
            while self._num_read < len(self.lines):
                self._num_read += 1
                if all(word in self.lines[self._num_read - 1] for word in words):
                    found.append(self.lines[self._num_read - 1])
                    return True
            assert self._thread.is_alive(), f"ended without {words}:\n{self.output}"
            return False

        wait_until(is_there, seconds, lambda: f"no {words} in:\n{self.output}")
        return found[0]

    def pid(self, role: str, *, other_than: int = 0) -> int:
        """Of the process that fills ``role`` now; a successor where the one before is known."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in worker_pids(role) if pid != other_than]
            return bool(found)

        wait_until(is_there, CLEAN_S)
        return found[0]

    def send(self, role: str, number: int) -> int:
        pid = self.pid(role)
        os.kill(pid, number)
        return pid

    def wait_until_stopped(self, role: str) -> None:
        pid = self.pid(role)
        wait_until(lambda: state_of(pid) == "T", DEADLINE_S, lambda: self.output)

    def end(self, seconds: float = DEADLINE_S) -> tuple[int, str]:
        """Exit code and last line; soon after it nothing of the run may be left."""
        code = self.process.wait(seconds)
        self._thread.join(CLEAN_S)
        assert "Traceback" not in self.output
        watch = Stopwatch()
        wait_until(lambda: not leftovers(self.folder), CLEAN_S, lambda: f"{leftovers(self.folder)}\n{self.output}")
        watch.within(CLEAN_S, "after the end, until nothing is left")
        return code, self.lines[-1]


@contextmanager
def live(arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Live]:
    process = start_command(arguments, environment)
    try:
        yield Live(process, folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the reaper does the rest
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """The letter of /proc for what its main thread does: ``T`` for one that is stopped; none where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def is_running(pid: int) -> bool:
    """Where nobody collects orphans, what has ended stays as a zombie."""
    return state_of(pid) not in ("", "Z", "X")


class EngineMode:
    """What the engines of a run do: ``fast``, ``slow``, ``raise``, ``hang``, ``leave``, ``deaf`` or, for an actor's
    role, ``halt ROLE``; see ``in_every_process``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        paths = [str(Path(__file__).with_name("in_every_process")), os.environ.get("PYTHONPATH", "")]
        self.environment = {"ENGINE_MODE": str(file), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def set(self, mode: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(mode)
        new.rename(self._file)


class Stopwatch:
    """Seconds since it was made, or ``since`` then, said where pytest shows output, and held against a bound."""

    def __init__(self, since: float | None = None) -> None:
        self._start = time.monotonic() if since is None else since

    def within(self, seconds: float, what: str) -> float:
        took = time.monotonic() - self._start
        print(f"FAULT {what}: {took:.1f} s")
        assert took <= seconds, what
        return took


def resident_bytes(pid: int) -> int:
    words = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(words.split()[1]) * 1024

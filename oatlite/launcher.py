"""Starting, watching and stopping the processes of a run on this machine, with a reaper behind them.

The supervisor knows only this interface; another launcher can place the same roles on other machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from oatlite import reaper

STOP_GRACE_S = 5.0
HURRY_POLL_S = 0.1
REAPER_S = 15.0
PREFIX = "oatlite-"
LONGEST_BASE_BYTES = 48
RUN_VARIABLE = "OATLITE_RUN"
"""In the environment of every process of a run, the run's private folder."""


def socket_base() -> Path:
    """Where private folders are made: the folder for temporary files, or ``/tmp`` where that lies too deep.

    A socket path must stay under 108 bytes, and vLLM's workers name theirs by 36 characters.
    """
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) <= LONGEST_BASE_BYTES else "/tmp")


class Worker:
    """A running process of the run, in a process group of its own."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, end_signal: int = signal.SIGTERM) -> None:
        self._process = process
        self.log = log
        self.end_signal = end_signal

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Signal the process and its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def tell(self, number: int) -> None:
        """Signal the process alone: a handler that it has is none of its children's."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended in time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within this, Ctrl-C and SIGTERM wait where they would raise: nobody would end a process that is started and not
    yet known. Where they are ignored or end this process, they do."""
    is_main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    came: list[int] = []
    for number in handlers:
        signal.signal(number, lambda signalled, _: came.append(signalled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signalled in came:
            signal.raise_signal(signalled)


class LocalLauncher:
    """Owns the run's private folder and its reaper. Use as a context manager: leaving it leaves nothing behind.

    The folder is named after the run and locked while the launcher lives, which says whose leftovers are whose.
    """

    def __init__(self, segment_prefix: str) -> None:
        self.run_id = secrets.token_hex(6)
        self.private_dir = socket_base() / f"{PREFIX}{self.run_id}"
        self.private_dir.mkdir(mode=0o700)
        self._lock = os.open(self.private_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._leftovers = (str(self.private_dir), f"{segment_prefix}{self.run_id}-")
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, *self._leftovers],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._workers: list[Worker] = []
        self._started: list[int] = []

    def __enter__(self) -> LocalLauncher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop_all()
        assert self._reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.close()
        if not self._is_reaped():
            reaper.remove_leftovers(*self._leftovers, self._started)
        os.close(self._lock)

    def _is_reaped(self) -> bool:
        """Whether the reaper has done its work: it may have been killed itself, or be stopped."""
        try:
            return self._reaper.wait(REAPER_S) == 0
        except subprocess.TimeoutExpired:
            self._reaper.kill()
            self._reaper.wait()
            return False

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        end_signal: int = signal.SIGTERM,
    ) -> Worker:
        """Start ``command`` with output to the end of ``log``; the reaper knows of it from its first moment.

        ``end_signal`` is what asks it to end.
        """
        with log.open("ab") as output, _undisturbed():
            process = subprocess.Popen(
                command,
                env={**environment, RUN_VARIABLE: str(self.private_dir)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return self.adopt(process, log, end_signal=end_signal)

    def adopt(self, process: subprocess.Popen[bytes], log: Path, *, end_signal: int = signal.SIGTERM) -> Worker:
        """Watch and stop a process that was just started, in a session of its own, with output to ``log``."""
        worker = Worker(process, log, end_signal)
        self._workers.append(worker)
        self._started.append(worker.pid)
        self._tell_reaper("+", worker)
        return worker

    def forget(self, worker: Worker) -> None:
        """An ended process's number may soon be another's."""
        worker.signal(signal.SIGKILL)  # what it may have left in its group
        self._workers.remove(worker)
        self._tell_reaper("-", worker)

    def stop_all(self, grace_s: float = STOP_GRACE_S, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Ask all processes to end, and kill those that are still there after ``grace_s``, or once ``is_hurried``."""
        for worker in self._workers:
            worker.signal(worker.end_signal)
            worker.signal(signal.SIGCONT)
        deadline = time.monotonic() + grace_s
        for worker in list(self._workers):
            while not worker.wait(HURRY_POLL_S):
                if is_hurried() or time.monotonic() > deadline:
                    worker.signal(signal.SIGKILL)
                    worker.wait(STOP_GRACE_S)
                    break
            self.forget(worker)

    def _tell_reaper(self, sign: str, worker: Worker) -> None:
        assert self._reaper.stdin is not None
        # A reaper that was killed must not keep the workers from being stopped.
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.write(f"{sign}{worker.pid}\n".encode())
            self._reaper.stdin.flush()

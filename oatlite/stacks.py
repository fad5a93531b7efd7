"""The stacks of a worker's threads, written into its log when the supervisor asks for them."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oatlite.launcher import Worker

STACKS_SIGNAL = signal.SIGUSR1
TIMEOUT_S = 10.0  # a busy machine writes them slowly, a process on a dead disk never
POLL_S = 0.05
OUTERMOST = b"in _run_module_as_main"  # of the main thread, which is written last


def write_stacks_when_asked() -> None:
    """In the worker. Python need not be running its code for it: a thread that hangs in a library is shown too."""
    faulthandler.register(STACKS_SIGNAL, all_threads=True, chain=False)


def ask_for_stacks(workers: Sequence[Worker]) -> None:
    """Returns when the logs hold them whole, or after TIMEOUT_S. A stopped process runs no handler, so it goes on."""
    ends = [worker.log.stat().st_size for worker in workers]
    for worker in workers:
        _signal_main_thread(worker.pid)
        worker.signal(signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    for worker, end in zip(workers, ends, strict=True):
        while worker.exit_code() is None and time.monotonic() < deadline and not _has_stacks(worker, end):
            time.sleep(POLL_S)


def _signal_main_thread(pid: int) -> None:
    """Whichever thread of the process takes the signal writes all stacks. Of those that go on meanwhile they may be
    torn, so the main thread had better write its own; a process that was stopped lets any of them."""
    to_thread = getattr(ctypes.CDLL(None), "tgkill", None)  # of glibc since 2.30
    if to_thread is not None:
        to_thread(pid, pid, STACKS_SIGNAL)
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)


def _has_stacks(worker: Worker, start: int) -> bool:
    with worker.log.open("rb") as log:
        log.seek(start)
        return OUTERMOST in log.read()

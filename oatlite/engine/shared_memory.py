"""Names for the shared memory that vLLM's processes speak through, by which the reaper knows whose it is.

With several workers vLLM makes queues in shared memory, and a lock, under names of Python's choice, and on some CPUs
segments of its own. Whoever made them
unlinks them, or Python's resource tracker does; a group of processes that is killed leaves them.
"""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import secrets
import tempfile
from multiprocessing import shared_memory
from pathlib import Path

from oatlite.hardware import SHARED_MEMORY
from oatlite.launcher import RUN_VARIABLE


def name_after_run() -> None:
    """From here on, segments and semaphores that :mod:`multiprocessing` makes in this process bear the run's name."""
    run = _run()
    if run is None:  # and no reaper
        return

    class Named(shared_memory.SharedMemory):
        def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
            super().__init__(f"{run}-{secrets.token_hex(8)}" if name is None else name, create, size)
            self._locked = _locked(self.name)

    shared_memory.SharedMemory = Named  # type: ignore[misc]
    multiprocessing.current_process()._config["semprefix"] = f"/{run}"  # type: ignore[attr-defined]


def name_meeting_after_run() -> None:
    """The file by which vLLM's workers on a CPU meet bears the run's name: where the CPU has what it takes, they speak
    through segments that are named after it."""
    run = _run()
    if run is None:
        return
    from vllm.v1.executor import multiproc_executor

    def meeting() -> str:
        return f"file://{tempfile.gettempdir()}/{run}-{secrets.token_hex(8)}"

    multiproc_executor.get_file_store_init_method = meeting


def _run() -> str | None:
    """The name of the run that this process is of."""
    folder = os.environ.get(RUN_VARIABLE)
    return None if folder is None else Path(folder).name


def _locked(name: str) -> mmap.mmap:
    """A mapping of a segment, with the lock that those of weights have too: it says that somebody uses it."""
    descriptor = os.open(SHARED_MEMORY / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return mmap.mmap(descriptor, 1, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)

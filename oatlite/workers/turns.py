"""Processes on one GPU take turns at changing how much of its memory they hold: a lock file for each GPU.

vLLM measures at its start what is free before and after, and when it falls asleep what that has freed; whoever takes
or gives back memory meanwhile makes these measurements wrong or fails them. So an actor holds the lock while it starts,
falls asleep and wakes, and a learner while it learns, at whose end it gives back what it does not keep. Nobody who
holds it waits for another process on the same GPU, so it cannot be waited for in a circle, and the kernel frees that of
a process that is killed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from oatlite.errors import DeadlineExceeded

POLL_S = 0.02


class Turn:
    """The lock of one GPU at ``path``; without a path there is nobody to wait for."""

    def __init__(
        self, path: Path | None, gives_back: Callable[[], None] | None = None, *, timeout_s: float = 3600.0
    ) -> None:
        """``gives_back`` is called at the end of each turn; ``timeout_s`` is for waiting until one begins."""
        self._path = path
        self._timeout_s = timeout_s
        self._gives_back = gives_back

    @property
    def is_shared(self) -> bool:
        return self._path is not None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, no other process on the GPU takes or gives back memory. Waits until that is so, and raises
        DeadlineExceeded where it never is."""
        if self._path is None:
            yield
            return
        lock = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait(lock)
            yield
            if self._gives_back is not None:
                self._gives_back()
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile holds the file open
            os.close(lock)

    def _wait(self, lock: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"another process on the same GPU has held its lock for {self._timeout_s:.0f} s"
                    ) from None
            time.sleep(POLL_S)

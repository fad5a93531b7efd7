"""Ctrl-C, SIGTERM and a terminal that goes away, noted while a run goes on; the run decides what they come to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from oatlite.errors import OatliteError


class Interrupted(OatliteError):
    """Ctrl-C or SIGTERM ended the run; ``exit_code`` says which."""

    def __init__(self, exit_code: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def collected_signals(into: list[int]) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP instead of raising, so that they are acted upon between two steps of the watch.

    Once there was one, the end has begun, and takes a bounded time that another one must not cut into. SIGHUP, of a
    terminal that is gone, may come twice for one, and nothing can be written there from then on. Whoever ends a whole
    session sends SIGTERM and SIGHUP, in any order: together they are one.
    """
    terminals = [number for number in (1, 2) if os.isatty(number)]
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not (number == signal.SIGTERM and came and set(came) == {signal.SIGHUP}):
            into.append(number)
        came.append(number)

    def hang_up(number: int, frame: FrameType | None) -> None:
        if not came:
            into.append(number)
        came.append(number)
        if came.count(number) == 1:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if into else handler)

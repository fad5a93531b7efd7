"""Ctrl-C and SIGTERM as errors of ours, so that what is open is closed before the process ends, in one line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from oatlite.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, OatliteError


class Stopped(OatliteError):
    """A signal ended the command; ``exit_code`` says which."""

    def __init__(self, exit_code: int, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.exit_code = exit_code


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within this, SIGTERM does what Ctrl-C does, and either comes out as :class:`Stopped`.

    On its way it is a KeyboardInterrupt, which no library takes for an error of its own. What that was given to say,
    the error says too.
    """
    terminated: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as stop:
        words = " ".join(map(str, stop.args))
        if terminated:
            raise Stopped(EXIT_TERMINATED, "terminated", words) from None
        raise Stopped(EXIT_INTERRUPTED, "interrupted", words) from None
    finally:
        signal.signal(signal.SIGTERM, before)

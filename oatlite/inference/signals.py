"""SIGTERM as an error of ours, so that what is open is closed before the process ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from oatlite.errors import EXIT_TERMINATED, OatliteError


class Terminated(OatliteError):
    exit_code = EXIT_TERMINATED


@contextmanager
def terminable() -> Iterator[None]:
    """Within this, SIGTERM does what Ctrl-C does, and comes out as :class:`Terminated`.

    On its way it is a KeyboardInterrupt, which no library takes for an error of its own.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise Terminated("terminated") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)

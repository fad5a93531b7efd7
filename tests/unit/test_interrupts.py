from __future__ import annotations

import signal
from collections.abc import Sequence
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from oatlite.interrupts import collected_signals


@pytest.mark.parametrize(
    ("sent", "noted"),
    [
        ([SIGTERM], [SIGTERM]),
        ([SIGTERM, SIGTERM], [SIGTERM, SIGTERM]),
        ([SIGINT, SIGINT], [SIGINT, SIGINT]),
        ([SIGHUP, SIGHUP], [SIGHUP]),
        ([SIGTERM, SIGHUP], [SIGTERM]),
        ([SIGHUP, SIGTERM], [SIGHUP]),
        ([SIGHUP, SIGHUP, SIGTERM], [SIGHUP]),
        ([SIGHUP, SIGTERM, SIGTERM], [SIGHUP, SIGTERM]),
        ([SIGINT, SIGHUP], [SIGINT]),
    ],
)
def test_what_ends_a_session_asks_once(sent: Sequence[signal.Signals], noted: Sequence[signal.Signals]) -> None:
    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP)]
    into: list[int] = []
    try:
        signal.signal(SIGHUP, signal.SIG_DFL)
        with collected_signals(into):
            for number in sent:
                signal.raise_signal(number)
    finally:
        for number, handler in zip((SIGINT, SIGTERM, SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert into == noted

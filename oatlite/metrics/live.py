"""The live screen: progress, what each process does, the curves, and the latest pair, in whatever space there is."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live

from oatlite.metrics.console import Console, clean
from oatlite.metrics.screen import ScreenState, final_frame, frame

REFRESH_S = 0.25
IDLE_REFRESH_S = 1.0
TIMED_STEPS = 20


class LiveConsole(Console):
    """Draws on the terminal's alternate screen, from a thread of its own, and leaves the last curves behind."""

    def __init__(self, *, title: str, total_steps: int | None, stream: TextIO) -> None:
        super().__init__(title=title, total_steps=total_steps, stream=stream)
        self._lock = threading.Lock()
        self._state = ScreenState(title=self.title, total_steps=total_steps, history=self.history)
        self._step_times: deque[float] = deque(maxlen=TIMED_STEPS)
        self._has_changed = True
        self._stopping = threading.Event()
        self._rich = RichConsole(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._rich, screen=True, auto_refresh=False, get_renderable=self._frame)
        self._live.start()
        self._thread = threading.Thread(target=self._refresh, name="screen", daemon=True)
        self._thread.start()

    def stage(self, role: str, stage: str, detail: str = "") -> None:
        with self._lock:
            self._state.set_stage(clean(role), clean(stage), clean(detail))
            self._has_changed = True

    def record(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self.history.add(record)
            if record.get("kind") == "step":
                self._step_times.append(time.monotonic())
                self._state.step_s = self._seconds_per_step()
            self._has_changed = True

    def pair(self, pair: Mapping[str, Any]) -> None:
        with self._lock:
            self._state.pair = dict(pair)
            self._has_changed = True

    def note(self, line: str) -> None:
        with self._lock:
            self._state.notes.append(clean(line))
            self._has_changed = True

    def _stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        try:
            self._live.stop()
            self._rich.print(final_frame(self._state, self._rich.width))
        except (OSError, ValueError):  # the terminal is gone
            pass
        for note in self._state.notes:
            self._print(note)

    def _seconds_per_step(self) -> float | None:
        times = self._step_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def _frame(self) -> Any:
        with self._lock:
            self._state.elapsed_s = self.elapsed_s
            return frame(self._state, self._rich.width, self._rich.height)

    def _refresh(self) -> None:
        """Redraw at most four times a second; once a second when only the clocks move."""
        drawn = 0.0
        while not self._stopping.wait(REFRESH_S):
            if not self._has_changed and time.monotonic() - drawn < IDLE_REFRESH_S:
                continue
            self._has_changed = False
            drawn = time.monotonic()
            try:
                self._live.refresh()
            except Exception:  # a screen must never end a run
                logging.getLogger(__name__).exception("the live screen stopped")
                return

"""What a run shows while it runs: a live screen on a terminal, plain lines elsewhere, behind one interface."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, TextIO

from oatlite.metrics.summary import History, duration, summary_lines

QUIET_STAGES = frozenset({"generate", "score", "learn", "sync", "evaluate", "idle"})
"""Stages that come back every step, which plain lines tell only until the first step is done."""


class Console(ABC):
    """Told by the supervisor what happens; shows it. May be called from any one thread; a context manager.

    Whatever comes in is untrusted: control characters are taken out and no markup is interpreted.
    """

    def __init__(self, *, title: str, total_steps: int | None, stream: TextIO) -> None:
        self.title = clean(title)
        self.total_steps = total_steps
        self.stream = stream
        self.history = History()
        self._started = time.monotonic()
        self._is_closed = False

    @abstractmethod
    def stage(self, role: str, stage: str, detail: str = "") -> None:
        """``role`` ("actor 1") is now in ``stage`` ("generate")."""

    @abstractmethod
    def record(self, record: Mapping[str, Any]) -> None:
        """A record of :mod:`oatlite.metrics.records`."""

    @abstractmethod
    def pair(self, pair: Mapping[str, Any]) -> None:
        """The latest verdict: ``prompt``, ``chosen``, ``rejected``, ``win_probability`` of the chosen."""

    @abstractmethod
    def note(self, line: str) -> None:
        """Something that a person should read once."""

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """End; with a ``summary`` (keys as in ``SUMMARY_KEYS`` of records, all optional) print what the run came to."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop()
        if summary is not None:
            for line in summary_lines(self.history, summary, self.elapsed_s):
                self._print(line)

    @abstractmethod
    def _stop(self) -> None:
        """Leave the terminal as it was found."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _print(self, line: str) -> None:
        write_line(self.stream, clean(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PlainConsole(Console):
    """A line per record, per note, and per stage until the first step is done."""

    def stage(self, role: str, stage: str, detail: str = "") -> None:
        if self.history.last_step and stage in QUIET_STAGES:
            return
        self._stamp(f"{role:<10} {stage}{': ' if detail else ''}{detail}")

    def record(self, record: Mapping[str, Any]) -> None:
        self.history.add(record)
        if record.get("kind") == "step":
            self._stamp("  ".join(step_words(record, self.total_steps)))
        elif record.get("kind") == "eval":
            self._stamp("  ".join(eval_words(record)))

    def pair(self, pair: Mapping[str, Any]) -> None:
        """Nothing: the run's ``samples.jsonl`` holds the texts."""

    def note(self, line: str) -> None:
        self._stamp(line)

    def _stop(self) -> None:
        """Nothing: lines stay where they are."""

    def _stamp(self, text: str) -> None:
        self._print(f"{duration(self.elapsed_s):>7}  {text}")


def open_console(
    ui: Literal["auto", "live", "plain"], *, title: str, total_steps: int | None, stream: TextIO | None = None
) -> Console:
    """The live screen where ``stream`` (default: standard output) is a terminal that can show it, else plain lines."""
    stream = sys.stdout if stream is None else stream
    can_show = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and "utf" in (stream.encoding or "").lower()
    if ui == "live" or (ui == "auto" and can_show):
        from oatlite.metrics.live import LiveConsole

        return LiveConsole(title=title, total_steps=total_steps, stream=stream)
    console = PlainConsole(title=title, total_steps=total_steps, stream=stream)
    console.note(console.title)
    return console


def step_words(record: Mapping[str, Any], total_steps: int | None) -> Iterator[str]:
    yield f"step {record['step']}/{total_steps}" if total_steps else f"step {record['step']}"
    for key, label in (
        ("loss", "loss"),
        ("reward", "reward"),
        ("gold_score", "gold"),
        ("margin", "margin"),
        ("accuracy", "acc"),
        ("kl", "kl"),
        ("response_tokens", "tokens"),
    ):
        if isinstance(record.get(key), int | float):
            yield f"{label} {record[key]:.4g}"
    perf = record.get("perf", {})
    if isinstance(perf.get("step_s"), int | float):
        yield f"{perf['step_s']:.1f} s"
    if isinstance(perf.get("tokens_per_s"), int | float):
        yield f"{perf['tokens_per_s']:,.0f} tok/s"


def eval_words(record: Mapping[str, Any]) -> Iterator[str]:
    yield f"evaluation at step {record['step']}"
    if isinstance(record.get("win_rate"), int | float):
        yield f"win rate {record['win_rate']:.1%}"
    for key, label in (
        ("loss", "loss"),
        ("margin", "margin"),
        ("accuracy", "acc"),
        ("reward", "reward"),
        ("gold_score", "gold"),
        ("response_tokens", "tokens"),
    ):
        if isinstance(record.get(key), int | float):
            yield f"{label} {record[key]:.4g}"


def clean(text: Any) -> str:
    """Text on one line, harmless to a terminal: no control characters, no escapes, no reversed direction."""
    spaced = (" " if char in "\n\r\t" else char for char in str(text))
    return "".join(char if _is_shown(char) else "\N{REPLACEMENT CHARACTER}" for char in spaced)


def _is_shown(char: str) -> bool:
    # Cc: control, Cf: format (direction overrides, zero width), Cs: half a surrogate pair, Zl and Zp: line breaks.
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def write_line(stream: TextIO, line: str) -> None:
    """Write what the stream's encoding can hold; a stream that is gone stays silent, since a run matters more."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(line.encode(encoding, "replace").decode(encoding, "replace") + "\n")
        stream.flush()
    except (OSError, ValueError):
        return

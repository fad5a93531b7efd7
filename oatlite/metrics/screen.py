"""A frame of the live screen: a pure function of its state and the size of the terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from oatlite.metrics.console import clean
from oatlite.metrics.curves import Points, plot
from oatlite.metrics.summary import SHARES, History, duration

STAGE_STYLES = {"generate": "cyan", "score": "magenta", "learn": "green", "sync": "yellow", "evaluate": "blue"}
TROUBLE = {"restarting": "bold red", "stopped": "red", "failed": "bold red"}
CURVE_STYLES = {"win_rate": "green", "reward": "cyan", "gold_score": "yellow", "accuracy": "green", "loss": "cyan"}
GAP = 2
MIN_CURVE_LINES = 3
MAX_CURVE_LINES = 24


@dataclass(slots=True)
class ScreenState:
    title: str
    total_steps: int | None
    history: History
    elapsed_s: float = 0.0
    step_s: float | None = None
    """Seconds from one step to the next, lately."""
    stages: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    """By role: stage, detail, and when it began (monotonic)."""
    pair: Mapping[str, Any] | None = None
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    def set_stage(self, role: str, stage: str, detail: str) -> None:
        before = self.stages.get(role)
        since = before[2] if before and before[0] == stage else time.monotonic()
        self.stages[role] = (stage, detail, since)


def frame(state: ScreenState, width: int, height: int) -> Text:
    """Exactly ``height`` lines of at most ``width`` cells. What is worth most comes first when space is short."""
    head = [_header(state, width), _progress(state, width), Text()]
    stages = _stages(state, width, most=max(2, height // 6))
    left = height - len(head) - len(stages)
    num_notes = min(len(state.notes), max(1, left // 8))
    pair = [Text(), *_pair(state.pair, width, max(3, min(12, left * 2 // 5)))] if state.pair else []
    notes = [Text(_fit(note, width), style="dim") for note in list(state.notes)[-num_notes:]] if num_notes else []
    curve_lines = left - len(pair) - len(notes) - (2 if notes else 1)
    lines = head + stages
    if curve_lines >= MIN_CURVE_LINES:
        lines += [Text(), *_curves(state, width, min(curve_lines, MAX_CURVE_LINES))]
    lines += pair + ([Text(), *notes] if notes else [])
    lines = lines[:height] + [Text()] * (height - len(lines))
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def final_frame(state: ScreenState, width: int) -> Text:
    """The curves as they ended, to be left in the terminal's history."""
    if not any(state.history.curve(key) for key in CURVE_STYLES):
        return Text(_fit(state.title, width), style="bold")
    return Text("\n").join([Text(_fit(state.title, width), style="bold"), *_curves(state, width, 8), Text()])


def _header(state: ScreenState, width: int) -> Text:
    clock = duration(state.elapsed_s)
    title = _fit(f"oatlite  {state.title}", width - len(clock) - 1)
    return Text.assemble((title, "bold"), " " * (width - cell_len(title) - len(clock)), (clock, "dim"))


def _progress(state: ScreenState, width: int) -> Text:
    step = int(state.history.last_step.get("step", 0))
    total = max(step, state.total_steps) if state.total_steps else None
    words = [f"step {step}/{total}" if total else f"step {step}"]
    speed = state.history.last_step.get("perf", {}).get("tokens_per_s")
    after = []
    if total:
        after.append(f"{step / total:.0%}")
        if state.step_s is not None:
            after.append(f"{duration(max(0, total - step) * state.step_s)} left")
    if state.step_s is not None:
        after.append(f"{state.step_s:.1f} s/step")
    if isinstance(speed, int | float):
        after.append(f"{speed:,.0f} tok/s")
    while after and len(words[0]) + sum(len(word) + 2 for word in after) + 10 > width:
        after.pop()
    tail = "  ".join(after)
    room = max(0, width - len(words[0]) - len(tail) - 4)
    done = min(room, room * step // total) if total else 0
    bar = [("━" * done, "green"), ("━" * (room - done), "bright_black")] if total else [(" " * room, "")]
    return Text.assemble(words[0], "  ", *bar, "  ", tail)


def _stages(state: ScreenState, width: int, most: int) -> list[Text]:
    """One cell per process, in columns; those that don't fit are counted."""
    now = time.monotonic()
    cells = [(role, *entry) for role, entry in state.stages.items()]
    if not cells:
        return [Text("starting", style="dim")]
    columns = max(1, min(len(cells), width // 36))
    columns = math.ceil(len(cells) / math.ceil(len(cells) / columns))
    shown = cells if len(cells) <= columns * most else cells[: columns * most - 1]
    each = (width - GAP * (columns - 1)) // columns
    texts = [_stage(role, stage, detail, now - since, each) for role, stage, detail, since in shown]
    if len(shown) < len(cells):
        texts.append(Text(_fit(f"and {len(cells) - len(shown)} more", each), style="dim"))
    return [Text(" " * GAP).join(texts[i : i + columns]) for i in range(0, len(texts), columns)]


def _stage(role: str, stage: str, detail: str, seconds: float, width: int) -> Text:
    clock = f"{seconds:.0f} s" if seconds < 100 else duration(seconds)
    style = TROUBLE.get(stage) or STAGE_STYLES.get(stage, "")
    rest = width - cell_len(role) - cell_len(stage) - len(clock) - 4
    told = _fit(f"  {detail}", rest) if detail and rest > 6 else ""
    text = Text.assemble((role, "bold"), "  ", (stage, style), "  ", (clock, "dim"), (told, "dim"))
    text.truncate(width, pad=True)
    return text


def _curves(state: ScreenState, width: int, height: int) -> list[Text]:
    """A title and a plot each, side by side; the gold score only when there is one."""
    compared = state.history.compared.items()
    drawn = [(key, label) for key, label in compared if key != "gold_score" or state.history.curve(key)]
    each = (width - GAP * (len(drawn) - 1)) // len(drawn)
    columns = []
    for key, label in drawn:
        style = CURVE_STYLES[key]
        points = state.history.curve(key)
        if key in SHARES:
            points = [(step, value * 100) for step, value in points]
        lines = plot(points, width=each, height=height - 1, last_step=state.total_steps)
        latest, change = _latest(key, points)
        title = f"{label}  {latest}"
        if cell_len(title) + len(change) + 1 <= each:
            title += f" {change}"
        title = _fit(title.rstrip(), each)
        columns.append([Text(title, style=f"bold {style}"), *(_plot_line(line, style) for line in lines)])
    for column in columns:
        for text in column:
            text.truncate(each, pad=True)
    return [Text(" " * GAP).join(row) for row in zip(*columns, strict=True)]


def _latest(key: str, points: Points) -> tuple[str, str]:
    """The last value, and its change since the first."""
    if not points:
        return "", ""
    first, last = points[0][1], points[-1][1]
    if key in SHARES:
        return f"{last:.1f}%", f"({last - first:+.1f})"
    return f"{last:.3g}", f"({last - first:+.2g})"


def _plot_line(line: str, style: str) -> Text:
    text = Text(line, style=style)
    text.stylize("not bold dim default", 0, 6)
    return text


def _pair(pair: Mapping[str, Any], width: int, height: int) -> list[Text]:
    """Prompt, chosen and rejected, sharing ``height`` lines evenly, the rest going to the responses."""
    probability = pair.get("win_probability")
    verdict = f" {probability:.0%}" if isinstance(probability, int | float) else ""
    prompt_lines = max(1, height // 4)
    response_lines = max(1, (height - prompt_lines) // 2)
    parts = (
        ("prompt", "dim", str(pair.get("prompt", "")), prompt_lines),
        (f"chosen{verdict}", "green", str(pair.get("chosen", "")), response_lines),
        ("rejected", "red", str(pair.get("rejected", "")), response_lines),
    )
    lines: list[Text] = []
    for label, style, text, most in parts:
        for index, line in enumerate(_wrap(text, max(10, width - 12), most)):
            lines.append(Text.assemble((f"{label if index == 0 else '':<12}", style), line))
    return lines[:height]


def _wrap(text: str, width: int, most: int) -> Sequence[str]:
    """Untrusted text on at most ``most`` lines of ``width`` cells."""
    words = clean(text).split()
    lines = [""]
    for index, word in enumerate(words):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] = _fit(" ".join([lines[-1], *words[index:]]).strip(), width)
            break
        else:
            lines.append(_fit(word, width))
    return lines


def _fit(text: str, width: int) -> str:
    """At most ``width`` cells, with a mark where something was cut off."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""

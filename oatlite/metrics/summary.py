"""What a run came to: first and last values, time by stage, and a warning when the oracle was gamed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

STAGES = ("generate", "score", "learn", "sync", "eval")
COMPARED = {"win_rate": "win rate", "reward": "reward", "gold_score": "gold score"}
OFFLINE_COMPARED = {"accuracy": "accuracy", "loss": "loss"}
"""What stands for them where nothing is sampled: whether held-out pairs have the right one's implicit reward higher."""
SHARES = ("win_rate", "accuracy")


class History:
    """The series that curves and the summary are made of, fed with records."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.stage_s: dict[str, float] = defaultdict(float)
        self.last_step: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        kind = record.get("kind")
        if kind not in ("step", "eval"):
            return
        if kind == "step":
            self.last_step = dict(record)
        else:
            self.last_eval = dict(record)
        for key in (*COMPARED, *OFFLINE_COMPARED):
            value = record.get(key)
            if isinstance(value, int | float):
                self.series[f"{kind}/{key}"].append((int(record["step"]), float(value)))
        for key, value in record.get("perf", {}).items():
            stage = key.removesuffix("_s")
            if stage in STAGES and isinstance(value, int | float):
                self.stage_s[stage] += value

    @property
    def compared(self) -> dict[str, str]:
        """Names and labels of what the run is judged by; an offline run's records name no sampling policy."""
        is_offline = bool(self.last_step or self.last_eval) and not any(
            self.curve(key) for key in ("win_rate", "reward")
        )
        return OFFLINE_COMPARED if is_offline else COMPARED

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Points of a metric over steps: of training where it is measured there, else of evaluations. Of accuracy those
        of evaluations, if there are any, because training's are of other pairs each time."""
        series = [self.series.get(f"{kind}/{key}") or [] for kind in ("step", "eval")]
        return (series[1] or series[0]) if key == "accuracy" else (series[0] or series[1])

    def ends(self, key: str) -> tuple[float, float] | None:
        """First and last value: of evaluations, which see the same prompts each time, else of training."""
        points = self.series.get(f"eval/{key}", [])
        if len(points) < 2:
            points = self.series.get(f"step/{key}", [])
        return (points[0][1], points[-1][1]) if len(points) > 1 else None


def is_reward_hacking(history: History) -> bool:
    """Whether the oracle's reward rose while the gold score, which nothing trains on, fell."""
    reward, gold = history.ends("reward"), history.ends("gold_score")
    return reward is not None and gold is not None and reward[1] > reward[0] and gold[1] < gold[0]


def summary_lines(history: History, summary: Mapping[str, Any], seconds: float) -> Iterator[str]:
    """The lines that end a run. ``summary`` may hold ``run_dir``, ``model`` (its folder) and ``next`` (commands)."""
    done = [f"{_whole(summary.get('steps', history.last_step.get('step', 0)))} steps"]
    queries = summary.get("queries", history.last_step.get("queries"))
    if queries is not None:
        done.append(f"{_whole(queries)} oracle queries")
    yield f"done: {', '.join([*done, duration(summary.get('seconds', seconds))])}"
    for key, label in history.compared.items():
        ends = history.ends(key)
        if ends is not None:
            yield f"  {label:<11} {change(key, *ends)}"
    if is_reward_hacking(history):
        yield "  warning     reward hacking: the reward rose while the gold score fell."
        yield "              Stop earlier, or take a smaller --lr or a better oracle."
    total = sum(history.stage_s.values())
    if total > 0:
        shares = (f"{stage} {history.stage_s[stage] / total:.0%}" for stage in STAGES if history.stage_s[stage])
        yield f"  {'time':<11} {'  '.join(shares)}"
    for key, label in (("model", "model"), ("run_dir", "run folder")):
        if summary.get(key):
            yield f"  {label:<11} {summary[key]}"
    for index, command in enumerate(summary.get("next") or ()):
        yield f"  {'next' if index == 0 else '':<11} {command}"


def change(key: str, first: float, last: float) -> str:
    if key in SHARES:
        return f"{first:.1%} -> {last:.1%}  ({(last - first) * 100:+.1f} points)"
    return f"{_value(first)} -> {_value(last)}  ({'+' if last >= first else ''}{_value(last - first)})"


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _value(number: float) -> str:
    return f"{number:.2f}" if 0.1 <= abs(number) < 1000 or number == 0 else f"{number:.3g}"


def _whole(number: float) -> str:
    return f"{int(number):,}"

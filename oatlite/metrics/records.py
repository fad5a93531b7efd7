"""Records of a run, and the mean that can be added up over micro-batches, ranks and actors.

A record is a flat dict with a ``kind``: ``step``, ``eval`` or ``summary``. What was measured on the clock stands apart
under ``perf``, so that two runs of one seed agree on everything else. A metric that is not known is absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["step", "eval", "summary"]
Record = dict[str, Any]

STEP_KEYS = (
    "step",
    "policy_version",
    "queries",
    "epoch",
    "loss",
    "reward",
    "gold_score",
    "margin",
    "accuracy",
    "kl",
    "response_tokens",
    "truncated",
    "lr",
    "gradient_steps",
    "grad_norm",
    "mismatch_mean",
    "mismatch_max",
    "mismatch_outside",
    "staleness",
    "drift",
    "importance",
    "importance_capped",
    "trained_pairs",
    "unusable_pairs",
    "without_verdict",
    "online_win_rate",
)
EVAL_KEYS = (
    "step",
    "queries",
    "eval_queries",
    "win_rate",
    "win_probability",
    "reward",
    "gold_score",
    "response_tokens",
    "loss",
    "margin",
    "accuracy",
    "kl",
    "prompts",
)
SUMMARY_KEYS = ("steps", "queries", "seconds", "run_dir", "model", "warning", "next")
KEYS: dict[str, tuple[str, ...]] = {"step": STEP_KEYS, "eval": EVAL_KEYS, "summary": SUMMARY_KEYS}
PERF_KEYS = (
    "step_s",
    "generate_s",
    "score_s",
    "learn_s",
    "sync_s",
    "eval_s",
    "tokens_per_s",
    "memory_bytes",
    "threads",
)
REQUIRED: dict[str, tuple[str, ...]] = {"step": ("step",), "eval": ("step",), "summary": ()}
NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)*")


@dataclass(slots=True)
class Mean:
    """A mean that is still a sum and a count, so that parts of unequal size add up to the mean of the whole."""

    sum: float = 0.0
    count: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """One value, or the mean of ``weight`` values. A weight of zero adds nothing, whatever the value."""
        if weight:
            self.sum += value * weight
            self.count += weight

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float | None:
        """``None`` before anything was added."""
        return self.sum / self.count if self.count else None


def make_record(kind: Kind, *, perf: Mapping[str, Any] | None = None, **metrics: Any) -> Record:
    """A record in stable order: the keys above first, then an algorithm's own by name, then ``perf``.

    A :class:`Mean` gives its value; an empty one and ``None`` leave the metric out; a number that is not finite
    becomes ``None``, so that it is seen. Raises ``ValueError`` for an unknown kind, a missing key that the kind
    requires, a malformed name, or a value that is no number, text, bool or list of texts.
    """
    if kind not in KEYS:
        raise ValueError(f"no kind of record: {kind!r}")
    missing = [key for key in REQUIRED[kind] if metrics.get(key) is None]
    if missing:
        raise ValueError(f"a {kind} record needs {', '.join(missing)}")
    record: Record = {"kind": kind} | _ordered(metrics, KEYS[kind])
    if perf is not None:
        record["perf"] = _ordered(perf, PERF_KEYS)
    return record


def _ordered(values: Mapping[str, Any], first: tuple[str, ...]) -> Record:
    keys = [key for key in first if key in values] + sorted(set(values) - set(first))
    plain = {}
    for key in keys:
        if key in ("kind", "perf") or not NAME.fullmatch(key):
            raise ValueError(f"no name of a metric: {key!r}")
        value = values[key].value if isinstance(values[key], Mean) else values[key]
        if value is not None:
            plain[key] = _plain(key, value)
    return plain


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise ValueError(f"{key} is a {type(value).__name__}, not a number or text")

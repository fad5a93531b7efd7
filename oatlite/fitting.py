"""The optimizer loop of the commands that train without an actor: batches by length, schedule, steps, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oatlite.errors import ConfigError

Report = Callable[[str, int, int, str], None]
"""``report(stage, done, total, figures)`` is called once a step."""

_PLAIN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """AdamW with linear warm-up to ``lr``, then a cosine down to a tenth of it."""

    lr: float
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def factor(self, step: int, total: int) -> float:
        """The share of ``lr`` at ``step`` (from 0) of ``total``."""
        warmup = max(1, round(self.warmup_ratio * total))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def token_batches(lengths: Sequence[int], batch_tokens: int, generator: torch.Generator | None) -> list[list[int]]:
    """Cut rows into batches of like length with at most ``batch_tokens`` padded tokens each; every row comes once.

    Rows are shuffled first, so that those of equal length meet others in each epoch, and batches afterwards.
    Without a generator the order is fixed. A row longer than ``batch_tokens`` makes a batch of its own.
    """
    order = list(range(len(lengths))) if generator is None else _permutation(len(lengths), generator)
    order.sort(key=lambda row: lengths[row])
    batches: list[list[int]] = []
    for row in order:
        # Rows come in rising length, so the newest is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[row] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches if generator is None else [batches[i] for i in _permutation(len(batches), generator)]


def fit(
    model: torch.nn.Module,
    batches: Sequence[list[int]],
    loss_of: Callable[[list[int]], torch.Tensor],
    schedule: Schedule,
    report: Report,
    stage: str,
) -> None:
    """Take one optimizer step per batch on ``loss_of(batch)``, a scalar. Raises ConfigError if it diverges."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    smoothed = math.nan
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor(step, len(batches))
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise ConfigError(f"the loss is {value} at step {step + 1} of {len(batches)}", "lower --lr")
        smoothed = value if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * value
        report(stage, step + 1, len(batches), f"loss {smoothed:.3f}")
    model.eval()


@contextmanager
def console_report() -> Iterator[Report]:
    """Show progress on stderr: a bar in a terminal, else a plain line every few seconds and one per finished stage."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int, figures: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, figures="")
            progress.update(tasks[stage], completed=done, figures=figures)

        yield report


class _PlainLines:
    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, figures: str) -> None:
        now = time.monotonic()
        if done == total or now - self._last_s >= _PLAIN_EVERY_S:
            self._last_s = now
            print(f"{stage}: {done}/{total} {figures}", file=sys.stderr, flush=True)


def _permutation(num: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(num, generator=generator).tolist()

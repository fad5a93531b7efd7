"""Seconds of work that a GPU does behind the caller's back, and the most memory that it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu_rows.scale import Scale


def seconds(scale: Scale, work: Callable[[], Any], *, repeats: int = 5, warm_ups: int = 2) -> float:
    """The median over ``repeats`` of one call, from an idle device to an idle device."""
    found = []
    for repeat in range(warm_ups + repeats):
        scale.synchronize()
        start = time.perf_counter()
        work()
        scale.synchronize()
        if repeat >= warm_ups:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def copy_seconds(scale: Scale, num_bytes: int) -> float:
    """Of a plain copy of so many bytes from one place of the device to another."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=scale.place())
    target = torch.empty_like(source)
    return seconds(scale, lambda: target.copy_(source), repeats=15)


def peak_bytes(scale: Scale, work: Callable[[], Any]) -> int | None:
    """The most that one call held on the GPU beyond what was held before; None on a CPU, where nothing counts it."""
    if not scale.on_gpu:
        work()
        return None
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def mib(num_bytes: int | None) -> str:
    return "memory not measured" if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"

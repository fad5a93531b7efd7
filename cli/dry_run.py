"""What ``oatlite train --dry-run`` prints: the settings, the places, and what this machine lacks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oatlite.config.load import num_steps
from oatlite.config.on_disk import named_paths
from oatlite.config.placement import Place, places
from oatlite.config.schema import Config
from oatlite.config.steps import sync_past_epoch
from oatlite.hardware import Gpu, available_memory_bytes, free_bytes, usable_cores

GIB = 1 << 30


def report(config: Config, gpus: Sequence[Gpu]) -> list[str]:
    """Lines about a resolved configuration on a machine with these ``gpus``."""
    lines = ["Configuration", *_settings(config), "", "Placement", *_placement(config, gpus), ""]
    if config.placement.gpus:
        lines += ["Memory of GPUs, estimated", *_memory(config, gpus), ""]
    steps, per_step = num_steps(config), config.rollout.prompts_per_step
    known = f"at most {steps}" if steps is not None else "as many as the data gives"
    unit = "pairs" if config.rollout.offline else "prompts"
    lines += [f"Steps: {known}, of {per_step} {unit} each", ""]
    late_sync = sync_past_epoch(config, config.data.max_prompts) if config.data.max_prompts is not None else None
    lines += [f"Warning: {late_sync}", ""] if late_sync is not None else []
    for title, found in (("Missing here", _missing(config, gpus)), ("Downloads", _downloads(config))):
        lines.append(f"{title}: nothing" if not found else f"{title}:")
        lines += [f"  {line}" for line in found]
    return [*lines, "", "Dry run: nothing was started."]


def _settings(config: Config) -> Iterator[str]:
    dumped = config.model_dump()
    width = max(len(key) for section in dumped.values() for key in section)
    for section, values in dumped.items():
        yield f"  [{section}]"
        for key, value in values.items():
            yield f"    {key:<{width}}  {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, str):
        return repr(value) if "\n" in value else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _memory(config: Config, gpus: Sequence[Gpu]) -> Iterator[str]:
    from oatlite.gpu_shares import report as memory_lines

    offline, data = config.rollout.offline, config.data
    longest = (data.max_prompt_tokens, data.max_response_tokens if offline else config.sampling.max_new_tokens)
    for line in memory_lines(config, [gpu.total_bytes for gpu in gpus], longest):
        yield f"  {line}"


def _placement(config: Config, gpus: Sequence[Gpu]) -> Iterator[str]:
    rows = [("process", "device", "cores", "serves")]
    for place in places(config, usable_cores()):
        is_actor = place.role == "actor"
        device = _device(place, gpus, config.placement.gpus_per_actor if is_actor else 1)
        rows.append((place.name, device, _ranges(place.cores), f"learner {place.serves}" if is_actor else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _device(place: Place, gpus: Sequence[Gpu], num_processes: int) -> str:
    """``num_processes`` of vLLM's are what a CPU stands for several GPUs with."""
    if not place.gpus:
        return "CPU" if num_processes == 1 else f"CPU, {num_processes} processes"
    return ", ".join(f"GPU {gpu} ({gpus[gpu].name if gpu < len(gpus) else 'missing'})" for gpu in place.gpus)


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,8``"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _missing(config: Config, gpus: Sequence[Gpu]) -> list[str]:
    place, found = config.placement, []
    assert place.gpus is not None and place.actors is not None
    if place.gpus > len(gpus):
        found.append(f"GPUs: {place.gpus} asked, {len(gpus) or 'none'} here (--gpus {len(gpus)})")
    if config.sync.transport == "shm":
        buffer, free = config.sync.bucket_mib << 20, free_bytes()
        if buffer > free:
            found.append(f"shared memory: {buffer / GIB:.1f} GiB in /dev/shm, {free / GIB:.1f} GiB free")
    if place.gpus == 0:
        cache, free = place.kv_cache_gib * place.actors * GIB, available_memory_bytes()
        if cache > free:
            found.append(f"memory: {cache / GIB:.1f} GiB for caches alone, {free / GIB:.1f} GiB available")
    return found


def _downloads(config: Config) -> list[str]:
    found: dict[str, str] = {}
    for key, asset in named_paths(config):
        is_here = asset == "demo" or Path(asset).exists() or _is_cached(asset, is_data=key.startswith("data."))
        if not is_here:
            found.setdefault(asset, key)
    return [f"{key}: {asset} (hub)" for asset, key in found.items()]


def _is_cached(hub_id: str, *, is_data: bool) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"{'datasets' if is_data else 'models'}--{hub_id.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())

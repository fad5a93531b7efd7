"""The limits that a container or a service manager sets on this process, by Linux' control groups, old and new."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60
"""The first version writes a huge number for none."""
_MEMORY_USED = ("memory.current", "memory.usage_in_bytes")


class Use(NamedTuple):
    limit: int
    used: int


def memory() -> Use | None:
    """Bytes, page cache that can be dropped not counted as used; None without a limit."""
    return _tightest(
        (folder, _number(folder, "memory.max", "memory.limit_in_bytes"), _number(folder, *_MEMORY_USED))
        for folder in _folders("memory")
    )


def processes() -> Use | None:
    """Processes and threads; None without a limit."""
    return _tightest(
        (folder, _number(folder, "pids.max"), _number(folder, "pids.current")) for folder in _folders("pids")
    )


def cores() -> float | None:
    """Cores' worth of time that may be used; None without a limit."""
    found = []
    for folder in _folders("cpu"):
        quota = _text(folder / "cpu.max").split()
        quota = quota or [_text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if all(part.isdigit() for part in quota) and int(quota[1]):  # else "max", or -1
            found.append(int(quota[0]) / int(quota[1]))
    return min(found, default=None)


def _tightest(groups: Iterable[tuple[Path, int | None, int | None]]) -> Use | None:
    found = [
        Use(limit, max(0, used - _file_cache(folder)))
        for folder, limit, used in groups
        if limit is not None and used is not None
    ]
    return min(found, key=lambda use: use.limit - use.used, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """This process's group and those above it."""
    for line in _text(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = MOUNT / controllers if controllers else MOUNT
        folder = root / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _number(folder: Path, *names: str) -> int | None:
    texts = (_text(folder / name).strip() for name in names)
    found = next((int(text) for text in texts if text.isdigit()), None)
    return None if found is None or found >= NO_LIMIT else found


def _file_cache(folder: Path) -> int:
    found = re.findall(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), flags=re.MULTILINE)
    return int(found[-1]) if found else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such group, controller or limit
        return ""

"""Small filesystems of a test's own, real ones, in a mount namespace that other processes do not see."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest


class Namespace:
    def __init__(self, pid: int) -> None:
        self._pid = pid

    def inside(self, *command: str) -> list[str]:
        """What runs ``command`` where the filesystems are mounted."""
        return ["nsenter", f"--target={self._pid}", "--user", "--mount", "--preserve-credentials", "--wd=.", *command]

    def seen(self, path: Path) -> Path:
        """``path`` of the namespace, as it is seen from outside."""
        return Path(f"/proc/{self._pid}/root{path}")


@contextmanager
def small_filesystems(sizes: Mapping[Path, int]) -> Iterator[Namespace]:
    """Mount a tmpfs of so many bytes on each folder. Skips the test where the system does not allow that."""
    mounts = " && ".join(f"mount -t tmpfs -o size={size} none {folder}" for folder, size in sizes.items())
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{mounts} && echo mounted && exec sleep 1000"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("this machine allows no filesystems of our own")
        yield Namespace(holder.pid)
    finally:
        holder.kill()
        holder.communicate()

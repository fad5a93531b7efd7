"""A small process that outlives the supervisor by a moment and leaves nothing of the run behind.

It is started with plain ``python -I -S`` and imports the standard library alone. Over its standard input it is told
which process groups exist (``+GROUP``) and which have ended (``-GROUP``). When that input ends, because the
supervisor closed it or was killed, it kills what is left and removes the run's sockets and shared memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable

SWEEP_S = 5.0


def main(private_dir: str, segment_prefix: str) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: set[int] = set()
    started: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
            started.add(group)
        else:
            groups.discard(group)
    _kill(groups)
    remove_leftovers(private_dir, segment_prefix, started)


def remove_leftovers(private_dir: str, segment_prefix: str, started: Iterable[int]) -> None:
    """``started`` are the process numbers of the run: torch names its shared memory after the process, and a process
    that ends without its destructors leaves it. A number comes again: what a living process has mapped is not ours."""
    ours = (segment_prefix, f"sem.{segment_prefix}")
    torchs = tuple(f"torch_{number}_" for number in started)
    mapped = _mapped()
    for entry in os.listdir("/dev/shm"):
        if entry.startswith(ours) or (entry.startswith(torchs) and entry not in mapped):
            with contextlib.suppress(OSError):  # gone already, or of another user whose process has such a number
                os.unlink(os.path.join("/dev/shm", entry))
    shutil.rmtree(private_dir, ignore_errors=True)


def _mapped() -> set[str]:
    """What processes that may be looked at have mapped of shared memory."""
    found: set[str] = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as maps:
            found.update(line.rstrip().rpartition("/dev/shm/")[2] for line in maps if "/dev/shm/" in line)
    return found


def _kill(groups: set[int]) -> None:
    """Until none of them answers: a group may fork while it is being killed."""
    deadline = time.monotonic() + SWEEP_S
    while groups and time.monotonic() < deadline:
        for group in list(groups):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                groups.discard(group)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

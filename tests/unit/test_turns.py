"""Processes that share a GPU take turns: real ones, on a stand-in for its memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from oatlite.errors import DeadlineExceeded
from oatlite.workers.turns import Turn

SOON_S = 60.0
STARTS = """
import sys
from pathlib import Path
from oatlite.workers.turns import Turn

fake_gpu, lock, share = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for _ in range(50):
    with Turn(Path(lock) if lock else None).taken():
        before = int(fake_gpu.read_text() or 0)  # as vLLM: what is used before, and after
        for _ in range(share):
            fake_gpu.write_text(str(int(fake_gpu.read_text() or 0) + 1))
        assert int(fake_gpu.read_text()) - before == share, "somebody else took memory meanwhile"
print("done")
"""
HOLDS = """
import os, sys, time
from pathlib import Path
from oatlite.workers.turns import Turn

turn = Turn(Path(sys.argv[1]))
print("asks", flush=True)
with turn.taken():
    if sys.argv[2] == "forks" and os.fork() == 0:
        time.sleep(300)
    print("has", flush=True)
    sys.stdin.readline()
print("gave back", flush=True)
sys.stdin.readline()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=False, capture_output=True)
        process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_starts_on_one_gpu_measure_their_own_memory_alone(tmp_path: Path) -> None:
    fake_gpu = tmp_path / "used"
    fake_gpu.write_text("0")
    shares = (3, 5, 7)
    starting = [start(STARTS, fake_gpu, tmp_path / "gpu-0.lock", share) for share in shares]
    told = [process.communicate(timeout=SOON_S) for process in starting]
    assert [out.strip() for out, _ in told] == ["done"] * 3, [err for _, err in told]
    assert int(fake_gpu.read_text()) == 50 * sum(shares)


@pytest.mark.parametrize("how", ["gives back", "forks", "killed"])
def test_a_turn_ends_with_its_block_or_its_process(how: str, tmp_path: Path) -> None:
    """Also where a child that was forked meanwhile still holds the file open."""
    holder = start(HOLDS, tmp_path / "gpu-0.lock", how)
    assert [says(holder), says(holder)] == ["asks", "has"]
    waiter = start(HOLDS, tmp_path / "gpu-0.lock", "")
    try:
        assert says(waiter) == "asks"
        if how == "killed":
            holder.kill()
        else:
            assert holder.stdin is not None
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert says(holder) == "gave back"
        assert says(waiter) == "has"
    finally:
        end([holder, waiter])


def test_a_turn_that_nobody_gives_up_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    holder = start(HOLDS, tmp_path / "gpu-0.lock", "gives back")
    try:
        assert [says(holder), says(holder)] == ["asks", "has"]
        never = Turn(tmp_path / "gpu-0.lock", timeout_s=1.0)
        with pytest.raises(DeadlineExceeded, match="has held its lock for 1 s"), never.taken():
            raise AssertionError("two at once")
        assert holder.poll() is None
    finally:
        end([holder])


def test_alone_on_a_gpu_nobody_waits(tmp_path: Path) -> None:
    given_back: list[str] = []
    with Turn(None, lambda: given_back.append("all")).taken():
        pass
    assert not given_back and not Turn(None).is_shared and not list(tmp_path.iterdir())
    shared = Turn(tmp_path / "gpu-0.lock", lambda: given_back.append("what is not kept"))
    with shared.taken():
        assert not given_back
    assert given_back == ["what is not kept"] and shared.is_shared

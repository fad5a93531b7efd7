"""A disk that is full while a checkpoint is saved, a checkpoint that is damaged, and a full /dev/shm."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from live import CLEAN_S, EngineMode, Stopwatch, live, wait_until
from namespace import small_filesystems
from runs import DEADLINE_S, OATLITE, Inputs, Run, command

from oatlite.checkpoint import complete, steps_of

MIB = 1 << 20
START_S = 90.0  # Python's, with the libraries, on a busy machine


@pytest.mark.fault("9", "11")
def test_a_full_disk_keeps_the_checkpoints_before_and_a_damaged_one_gives_way_to_an_older_one_when_asked(
    one_by_one: Run, llama: Inputs, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    folder = disk / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    resume = (str(OATLITE), "resume", str(folder))
    with small_filesystems({disk: 24 * MIB}) as namespace:
        seen = namespace.seen(folder)
        arguments = command(llama, folder, "--algo", "simpo", "--save-every", "1", "--keep-last", "2")
        with live(namespace.inside(*arguments), seen, engine.environment) as run:
            wait_until(lambda: steps_of(seen / "checkpoints") == [2, 1], 300, lambda: run.output)
            newest, older = complete(seen / "checkpoints")
            size = sum(path.stat().st_size for path in newest.folder.rglob("*") if path.is_file())
            fill(seen.parent / "filler", leave=size // 2)
            engine.set("fast")
            watch = Stopwatch()
            code, last = run.end(CLEAN_S)
            watch.within(CLEAN_S, "disk full, from the step to the end")
        assert code == 5, run.output
        assert "No space left on device" in last and "step-000003" in last and str(folder) in last
        needed, free = map(int, re.findall(r"a checkpoint takes (\d+) bytes and (\d+) are free", last)[0])
        assert needed == size and size // 4 < free < size
        assert last.endswith(f"to go on from step 2: oatlite resume {folder}")
        newest.verify()
        older.verify()

        (seen.parent / "filler").unlink()
        damaged = newest.folder / newest.files[0].name
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        with live(namespace.inside(*resume), seen, engine.environment) as run:
            watch = Stopwatch()
            code, last = run.end(START_S + CLEAN_S)
            watch.within(START_S + CLEAN_S, "damaged checkpoint, from the start to the end")
        assert code == 4, run.output
        assert str(folder / "checkpoints" / "step-000002" / newest.files[0].name) in last
        assert "add --from-step 1" in last

        with live(namespace.inside(*resume, "--from-step", "1"), seen, engine.environment) as run:
            run.wait_for("step-000002 will be removed")
            assert steps_of(seen / "checkpoints") == [2, 1], "there is time to keep it"
            code, _ = run.end()
        assert code == 0, run.output
        assert Run(seen, code, "").metrics() == one_by_one.metrics()


def fill(path: Path, *, leave: int) -> None:
    """Take all but ``leave`` bytes of a disk, and never more, since a run writes there."""
    with path.open("wb") as file:
        disk = os.statvfs(path)
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - leave)


@pytest.mark.fault("19")
def test_a_full_dev_shm_ends_a_run_with_sizes_and_the_remedy(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with small_filesystems({Path("/dev/shm"): MIB // 4}) as namespace:
        with live(namespace.inside(*command(llama, folder)), folder) as run:
            watch = Stopwatch()
            code, last = run.end()
            watch.within(DEADLINE_S, "started with a full /dev/shm, to the end")
        assert list(namespace.seen(Path("/dev/shm")).iterdir()) == []
    assert code == 5, run.output
    assert re.search(r"learner 0: /dev/shm has \d+ bytes free and the weight buffer needs \d+; free some", last)
    assert "sync.bucket_mib" in last and str(folder / "logs" / "learner-0.log") in last

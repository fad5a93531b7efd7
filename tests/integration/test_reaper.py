"""Whatever ends a run, nothing of it stays: real processes, a real segment, and a launcher that is killed."""

import contextlib
import json
import mmap
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from oatlite.launcher import LocalLauncher

SHM = Path("/dev/shm")
PREFIX = "oatlite-test-"
SOON_S = 30.0
REAPED_S = 30.0  # which the design allows; it takes a fraction of a second

# A leader with two children in its group, one of which takes no notice of being asked to end.
FAMILY = ["sh", "-c", "sleep 300 & (trap '' TERM INT HUP; sleep 301) & wait"]
STUBBORN = ["sh", "-c", "trap '' TERM; while true; do sleep 0.1; done"]


def members(group):
    """The processes of a process group that still run."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == group and state not in "ZX":
                    alive.append(int(entry.name))
    return alive


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds=SOON_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def left_of(run):
    """What is still there of a run described by ``groups``, ``private_dir`` and ``segment``."""
    paths = [path for path in (run["private_dir"], run["segment"]) if os.path.exists(path)]
    return [pid for group in run["groups"] for pid in members(group)] + paths


@pytest.fixture
def log(tmp_path):
    return tmp_path / "worker.log"


@pytest.fixture
def other_segment():
    """Of a run that goes on, and whose name differs in the run's identity alone."""
    path = SHM / f"{PREFIX}{secrets.token_hex(6)}-weights"
    path.write_bytes(b"theirs")
    yield path
    path.unlink()


def test_shared_memory_that_torch_leaves_under_a_workers_number_goes_too(log):
    with LocalLauncher(PREFIX) as launcher:
        worker = launcher.start(["sleep", "300"], os.environ, log)
        names = (f"torch_{worker.pid}_12_0", f"torch_{worker.pid}7_12_0", f"torch_{worker.pid}_13_0")
        left, others, mapped = (SHM / name for name in names)
        for path in (left, others, mapped):
            path.write_bytes(b"x")
        with mapped.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 1)
    try:
        wait_for(lambda: not left.exists(), REAPED_S)
        wait_for(lambda: not launcher.private_dir.exists(), REAPED_S)
        assert others.exists(), "another process's"
        assert mapped.exists(), "a later process's, with the same number"
    finally:
        memory.close()
        others.unlink()
        mapped.unlink()


def litter(launcher):
    """Put a segment and a socket-like file where a run has them."""
    segment = SHM / f"{PREFIX}{launcher.run_id}-weights"
    segment.write_bytes(b"ours")
    (launcher.private_dir / "folder").mkdir()
    (launcher.private_dir / "folder" / "control").write_text("x")
    return segment


def start_family(launcher, log):
    worker = launcher.start(FAMILY, os.environ, log)
    wait_for(lambda: len(members(worker.pid)) >= 3)
    return worker


# --------------------------------------------------------------------------- a launcher that ends


def test_leaving_the_launcher_leaves_nothing(log, other_segment):
    with LocalLauncher(PREFIX) as launcher:
        workers = [start_family(launcher, log) for _ in range(2)]
        run = {
            "groups": [worker.pid for worker in workers],
            "private_dir": launcher.private_dir,
            "segment": litter(launcher),
        }
        assert left_of(run)
        launcher.stop_all(grace_s=SOON_S)
        reaper = launcher._reaper.pid
    wait_for(lambda: not left_of(run), REAPED_S)
    assert not is_running(reaper)
    assert other_segment.read_bytes() == b"theirs"


def test_an_error_inside_leaves_nothing_and_goes_on(log):
    def fail():
        with LocalLauncher(PREFIX) as launcher:
            run.update(groups=[start_family(launcher, log).pid])
            run.update(private_dir=launcher.private_dir, segment=litter(launcher))
            raise RuntimeError("as it came")

    run = {}
    with pytest.raises(RuntimeError, match="as it came"):
        fail()
    wait_for(lambda: not left_of(run), REAPED_S)


def test_a_process_that_does_not_end_when_asked_is_killed(log):
    with LocalLauncher(PREFIX) as launcher:
        stubborn = launcher.start(STUBBORN, os.environ, log)
        quick = launcher.start(["sleep", "300"], os.environ, log)
        wait_for(lambda: len(members(stubborn.pid)) >= 2)
        launcher.stop_all(grace_s=3)
        assert stubborn.exit_code() == -signal.SIGKILL
        assert quick.exit_code() == -signal.SIGTERM
        wait_for(lambda: not members(stubborn.pid), REAPED_S)


def test_nobody_waits_for_a_process_that_does_not_end_once_there_is_a_hurry(log):
    with LocalLauncher(PREFIX) as launcher:
        quick = launcher.start(["sleep", "300"], os.environ, log)
        stubborn = launcher.start(STUBBORN, os.environ, log)
        wait_for(lambda: len(members(stubborn.pid)) >= 2)
        asked = []
        launcher.stop_all(grace_s=1000, is_hurried=lambda: asked.append(quick.exit_code()) or len(asked) > 2)
        assert stubborn.exit_code() == -signal.SIGKILL
        assert asked[-1] == -signal.SIGTERM, "the other one was asked first"


def test_a_process_that_is_stopped_still_ends_when_asked(log):
    with LocalLauncher(PREFIX) as launcher:
        command = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.1; done"
        worker = launcher.start(["sh", "-c", command], os.environ, log)
        wait_for(lambda: log.read_text() == "ready\n")
        worker.signal(signal.SIGSTOP)
        launcher.stop_all(grace_s=SOON_S)
        assert worker.exit_code() == 7


def test_what_an_ended_process_left_in_its_group_is_killed_when_it_is_forgotten(log):
    with LocalLauncher(PREFIX) as launcher:
        worker = launcher.start(["sh", "-c", "sleep 300 & exit 3"], os.environ, log)
        assert worker.wait(SOON_S) and worker.exit_code() == 3
        assert members(worker.pid)
        launcher.forget(worker)
        wait_for(lambda: not members(worker.pid), REAPED_S)


def test_a_worker_has_its_log_its_environment_and_a_group_of_its_own(log):
    log.write_text("before\n")
    with LocalLauncher(PREFIX) as launcher:
        worker = launcher.start(["sh", "-c", "echo out $A; echo err >&2; cat"], os.environ | {"A": "1"}, log)
        assert worker.wait(SOON_S) and worker.exit_code() == 0  # cat found nothing to read
        waiting = launcher.start(["sleep", "300"], os.environ, log)
        assert os.getpgid(waiting.pid) == os.getsid(waiting.pid) == waiting.pid
        assert waiting.exit_code() is None and not waiting.wait(0.05)
    assert log.read_text() == "before\nout 1\nerr\n"


def test_the_private_folder_is_private_and_its_path_short_even_where_temporary_files_lie_deep(monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with LocalLauncher(PREFIX) as launcher:
        assert stat.S_IMODE(launcher.private_dir.stat().st_mode) == 0o700
        assert len(str(launcher.private_dir / "rollout-15")) < 100
    assert not launcher.private_dir.exists()


def test_a_reaper_that_was_killed_keeps_nothing_from_being_cleaned_up(log):
    with LocalLauncher(PREFIX) as launcher:
        before = start_family(launcher, log)
        launcher._reaper.kill()
        launcher._reaper.wait(SOON_S)
        after = start_family(launcher, log)
        run = {"groups": [before.pid, after.pid], "private_dir": launcher.private_dir, "segment": litter(launcher)}
    wait_for(lambda: not left_of(run), REAPED_S)


# --------------------------------------------------------------------------- a launcher that is killed

OWNER = """
    import json, os, sys, time
    from pathlib import Path
    from oatlite.launcher import LocalLauncher

    prefix, log, *commands = json.loads(sys.argv[1])
    launcher = LocalLauncher(prefix)
    workers = [launcher.start(command, os.environ, Path(log)) for command in commands]
    segment = Path("/dev/shm") / f"{prefix}{launcher.run_id}-weights"
    segment.write_bytes(b"ours")
    (launcher.private_dir / "control").write_text("x")
    gone = launcher.start(["true"], os.environ, Path(log))
    gone.wait(30)
    launcher.forget(gone)
    described = {"groups": [w.pid for w in workers], "reaper": launcher._reaper.pid, "gone": gone.pid}
    print(json.dumps(described | {"private_dir": str(launcher.private_dir), "segment": str(segment)}), flush=True)
    time.sleep(300)
"""


@pytest.fixture
def owned(log):
    """A launcher in a process of its own, with three workers: (process, what it started)."""
    arguments = json.dumps([PREFIX, str(log), FAMILY, STUBBORN, ["sleep", "300"]])
    command = [sys.executable, "-c", textwrap.dedent(OWNER), arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    run = json.loads(process.stdout.readline())
    try:
        for group, size in zip(run["groups"], (3, 2, 1), strict=True):
            wait_for(lambda group=group, size=size: len(members(group)) >= size)
        yield process, run
    finally:
        process.kill()
        process.wait(SOON_S)
        process.stdout.close()
        for group in run["groups"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(run["segment"])
        shutil.rmtree(run["private_dir"], ignore_errors=True)


def test_killing_the_launcher_leaves_nothing(owned, other_segment):
    process, run = owned
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not left_of(run), REAPED_S)
    wait_for(lambda: not is_running(run["reaper"]), REAPED_S)
    assert other_segment.read_bytes() == b"theirs"


def test_killing_the_launcher_ends_stopped_workers_too(owned):
    process, run = owned
    for group in run["groups"]:
        os.killpg(group, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not left_of(run), REAPED_S)


def test_killing_the_launchers_group_spares_the_reaper(owned):
    """As a shell or a batch system does it."""
    process, run = owned
    os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not left_of(run), REAPED_S)


def test_signals_do_not_stop_the_reaper(owned):
    process, run = owned
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    wait_for(lambda: all(ignores(run["reaper"], number) for number in signals))
    for number in signals:
        os.kill(run["reaper"], number)
    time.sleep(0.3)
    assert is_running(run["reaper"]) and left_of(run)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not left_of(run), REAPED_S)


def ignores(pid, number):
    """Whether a process ignores a signal; one that has just started does not yet."""
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def test_the_reaper_kills_nothing_while_the_launcher_lives(owned):
    process, run = owned
    time.sleep(0.5)
    assert process.poll() is None
    assert [is_running(group) for group in run["groups"]] == [True] * 3
    assert os.path.exists(run["segment"]) and os.path.exists(run["private_dir"])


def test_a_group_that_was_forgotten_is_not_killed(tmp_path):
    """Its number may be another's by now: here the group lives on, so that it can be seen."""
    reaper = Path(sys.modules["oatlite.reaper"].__file__)
    kept, forgotten = (subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2))
    private = tmp_path / "private"
    private.mkdir()
    told = f"+{kept.pid}\n+{forgotten.pid}\n-{forgotten.pid}\n"
    try:
        command = [sys.executable, "-I", "-S", str(reaper), str(private), f"{PREFIX}{secrets.token_hex(6)}-"]
        # Killed groups must be seen to end, and this process is the one that can collect its child.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        process.stdin.write(told)
        process.stdin.close()
        assert kept.wait(SOON_S) == -signal.SIGKILL
        assert process.wait(SOON_S) == 0
        assert forgotten.poll() is None and not private.exists()
    finally:
        for child in (kept, forgotten):
            child.kill()
            child.wait(SOON_S)

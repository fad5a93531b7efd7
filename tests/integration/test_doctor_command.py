"""``oatlite doctor`` as a person starts it, beside real runs: some that were killed with their reaper, some alive."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dead_runs import alone

OATLITE = Path(sys.executable).with_name("oatlite")
SHM = Path("/dev/shm")
SOON_S = 60.0
LONG_S = 240.0

OWNER = """
    import json, os, sys, time
    from pathlib import Path
    from oatlite.launcher import LocalLauncher
    from oatlite.weights import ShmBuffer

    launcher = LocalLauncher("oatlite-")
    worker = launcher.start(["sleep", "600"], os.environ, launcher.private_dir / "worker.log")
    buffer = ShmBuffer(1 << 20, launcher.run_id)
    semaphore = Path("/dev/shm") / f"sem.oatlite-{launcher.run_id}-queue"
    of_vllm = Path("/dev/shm") / f"oatlite-{launcher.run_id}-0123456789abcdef-tp:0-[0-1]-cpushm_0"
    for made in (semaphore, of_vllm):
        made.write_bytes(b"x")
    print(json.dumps({
        "run_id": launcher.run_id,
        "private_dir": str(launcher.private_dir),
        "segment": "/dev/shm/" + buffer.handle(launcher.run_id).segment,
        "num_bytes": 1 << 20,
        "semaphore": str(semaphore),
        "of_vllm": str(of_vllm),
        "worker": worker.pid,
        "reaper": launcher._reaper.pid,
    }), flush=True)
    time.sleep(600)
"""

WRITER = """
    import secrets, time
    from oatlite.weights import ShmBuffer

    buffer = ShmBuffer(1 << 20, secrets.token_hex(6))
    print(buffer.handle("").segment, flush=True)
    time.sleep(600)
"""

READER = """
    import sys, time
    from oatlite.messages import ShmHandle
    from oatlite.weights import open_buffer

    run_id, segment, num_bytes = sys.argv[1:]
    data = open_buffer(ShmHandle(run_id=run_id, segment=segment, num_bytes=int(num_bytes)))
    print("open", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="od-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


class Runs:
    """Real launchers in processes of their own, with a worker, a segment and a semaphore each."""

    def __init__(self, temporary: Path) -> None:
        self.environment = os.environ | {"TMPDIR": str(temporary), "CUDA_VISIBLE_DEVICES": ""}
        self._processes: list[subprocess.Popen[str]] = []
        self._started: list[dict[str, Any]] = []

    def start(self, *wrapper: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = self._python(OWNER, wrapper=wrapper)
        assert process.stdout is not None
        run = json.loads(process.stdout.readline())
        self._started.append(run)
        return process, run

    def start_reader(self, run: dict[str, Any]) -> None:
        """A process that has the run's segment open, and is none of the run's own."""
        reader = self._python(READER, run["run_id"], Path(run["segment"]).name, str(run["num_bytes"]))
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"

    def start_writer(self) -> tuple[subprocess.Popen[str], Path]:
        """A process with a segment, of a run that nothing else here tells of, as in another container."""
        writer = self._python(WRITER)
        assert writer.stdout is not None
        return writer, SHM / writer.stdout.readline().strip()

    def start_dead(self) -> dict[str, Any]:
        """A run whose reaper and launcher were killed, in that order, so that nobody cleaned up."""
        process, run = self.start()
        kill_reaper(run)
        process.kill()
        process.wait(SOON_S)
        return run

    def start_doctor(self, *arguments: str) -> subprocess.Popen[str]:
        command = [str(OATLITE), "doctor", "--json", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )
        self._processes.append(process)
        return process

    def _python(self, script: str, *arguments: str, wrapper: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*wrapper, sys.executable, "-c", textwrap.dedent(script), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(SOON_S)
            assert process.stdout is not None
            process.stdout.close()
        for run in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(run["worker"], signal.SIGKILL)
            for path in (run["segment"], run["semaphore"], run["of_vllm"]):
                Path(path).unlink(missing_ok=True)
        for run in self._started:  # or it would remove the folder together with the fixture that made it
            wait_until_gone(run["reaper"])


@pytest.fixture
def runs(temporary: Path) -> Iterator[Runs]:
    runs = Runs(temporary)
    with alone():
        yield runs
        runs.close()


def kill_reaper(run: dict[str, Any]) -> None:
    os.kill(run["reaper"], signal.SIGKILL)
    wait_until_gone(run["reaper"])


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + SOON_S
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def left_of(run: dict[str, Any]) -> set[str]:
    """What is there of a run: its paths and its worker."""
    paths = {key for key in ("private_dir", "segment", "semaphore", "of_vllm") if Path(run[key]).exists()}
    return paths | ({"worker"} if is_running(run["worker"]) else set())


ALL = {"private_dir", "segment", "semaphore", "of_vllm", "worker"}


def doctor(runs: Runs, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings by name."""
    return told_by(runs.start_doctor(*arguments))


def told_by(process: subprocess.Popen[str]) -> tuple[int, dict[str, dict[str, str]]]:
    output, errors = process.communicate(timeout=LONG_S)
    assert errors == ""
    told = json.loads(output)
    assert told["exit_code"] == process.returncode
    return process.returncode, {finding["name"]: finding for finding in told["findings"]}


@pytest.mark.fault("19")
def test_the_dead_run_is_shown_and_cleaned_away_and_the_living_one_never(runs: Runs) -> None:
    dead = runs.start_dead()
    _, alive = runs.start()
    _, unreaped = runs.start()
    kill_reaper(unreaped)  # only its launcher's locks speak for it

    code, seen = doctor(runs)
    assert code == 2, "a process of a dead run is a problem"
    assert seen["orphans"]["status"] == "problem"
    named = seen["orphans"]["detail"].split()
    assert str(dead["worker"]) in named
    assert {str(run["worker"]) for run in (alive, unreaped)}.isdisjoint(named)
    assert seen["leftovers"]["fix"] == seen["orphans"]["fix"] == "oatlite doctor --clean"
    assert "socket folder" in seen["leftovers"]["detail"]
    assert left_of(dead) == ALL, "looking changes nothing"

    _, seen = doctor(runs, "--clean")
    assert (seen["orphans"]["status"], seen["orphans"]["fix"]) == ("ok", "")
    assert seen["orphans"]["detail"].startswith("ended ")
    assert seen["leftovers"]["detail"].startswith("removed ")
    assert left_of(dead) == set()
    assert left_of(alive) == left_of(unreaped) == ALL
    assert is_running(alive["reaper"])


def clean_only(runs: Runs, *made: Path) -> None:
    """What ``--clean`` does, without the checks and the trial, at the moment when ``made`` are as good as new."""
    script = "import os, sys; from oatlite.leftovers import clean; [os.utime(path) for path in sys.argv[1:]]; clean()"
    subprocess.run([sys.executable, "-c", script, *made], check=True, env=runs.environment, timeout=LONG_S)


def test_a_segment_that_is_still_read_stays(runs: Runs) -> None:
    process, run = runs.start()
    runs.start_reader(run)
    kill_reaper(run)
    process.kill()
    process.wait(SOON_S)
    clean_only(runs)
    assert left_of(run) == {"segment"}


def test_a_segment_goes_by_its_own_lock_where_nothing_is_seen_of_its_run(runs: Runs) -> None:
    writer, segment = runs.start_writer()
    try:
        clean_only(runs)
        assert segment.stat().st_size == 1 << 20
        writer.kill()
        writer.wait(SOON_S)
        clean_only(runs)
        assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


def test_temporary_files_may_lie_elsewhere(runs: Runs, temporary: Path) -> None:
    """The run's lie in another folder than the doctor's, and its reaper is dead."""
    _, run = runs.start()
    kill_reaper(run)
    (temporary / "other").mkdir()
    runs.environment["TMPDIR"] = str(temporary / "other")
    clean_only(runs)
    assert left_of(run) == ALL


def test_a_run_in_a_container_is_seen_as_its_processes_see_it(runs: Runs, temporary: Path) -> None:
    """In a mount namespace of its own, its folder lies where the doctor has none, and its reaper is dead."""
    wrapper = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {temporary} && exec "$@"', "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces for this user")
    _, run = runs.start(*wrapper)
    kill_reaper(run)
    clean_only(runs)
    assert left_of(run) == ALL - {"private_dir"}
    assert Path(f"/proc/{run['worker']}/root{run['private_dir']}").is_dir()


def test_a_dying_launcher_is_left_to_its_reaper(runs: Runs) -> None:
    process, run = runs.start()
    os.kill(run["reaper"], signal.SIGSTOP)
    process.kill()
    process.wait(SOON_S)
    clean_only(runs)
    assert left_of(run) == ALL, "its reaper will do it"
    os.kill(run["reaper"], signal.SIGCONT)
    wait_until_gone(run["reaper"])
    assert left_of(run) == set()


def test_names_that_only_look_like_a_runs_stay(runs: Runs, temporary: Path) -> None:
    dead = runs.start_dead()
    personal = temporary / "oatlite-personal"
    personal.mkdir()
    linked = temporary / f"oatlite-{secrets.token_hex(6)}"
    linked.symlink_to(personal)
    (personal / "thesis.txt").write_text("years of work")
    others = [SHM / f"oatlite-{secrets.token_hex(6)}-weights", SHM / f"oatlite-test-{secrets.token_hex(6)}-x"]
    for path in others:
        path.write_bytes(b"theirs")
    try:
        clean_only(runs)
        assert left_of(dead) == set()
        assert (personal / "thesis.txt").exists() and linked.is_symlink()
        assert all(path.exists() for path in others)
    finally:
        for path in others:
            path.unlink()


def test_a_folder_and_a_segment_that_were_made_this_moment_stay(runs: Runs, temporary: Path) -> None:
    """A launcher locks its folder a moment after it has made it."""
    folder = temporary / f"oatlite-{secrets.token_hex(6)}"
    folder.mkdir(mode=0o700)
    segment = SHM / f"oatlite-{secrets.token_hex(6)}-{secrets.token_hex(8)}"
    segment.touch()
    try:
        clean_only(runs, folder, segment)
        assert folder.exists() and segment.exists()
        for path in (folder, segment):
            os.utime(path, (1, 1))
        clean_only(runs)
        assert not folder.exists() and not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


# The trial and the screen


def test_transports_are_tried_and_leave_nothing(runs: Runs, temporary: Path) -> None:
    process = runs.start_doctor("--run-dir", str(temporary))
    folder = private_folder_of(process, temporary)
    code, seen = told_by(process)
    assert seen["messages"]["status"] == "ok" and "4 MiB there and back" in seen["messages"]["detail"]
    assert seen["weights-shm"]["status"] == "ok" and "8 MiB in 3 buckets" in seen["weights-shm"]["detail"]
    assert seen["weights-cuda-ipc"]["detail"] == "not checked: no GPU that torch sees"
    assert str(temporary) in seen["disk"]["detail"]
    problems = [finding for finding in seen.values() if finding["status"] == "problem"]
    assert (code == 0) == (not problems)
    assert all(finding["fix"] for finding in problems)
    assert list(temporary.iterdir()) == []
    assert list(SHM.glob(f"{folder.name}-*")) == []


def private_folder_of(process: subprocess.Popen[str], temporary: Path) -> Path:
    """Of the trial, which is named as its segments are; once it is there."""
    deadline = time.monotonic() + LONG_S
    while not (found := list(temporary.glob("oatlite-*"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_a_torch_that_cannot_be_imported_is_told(runs: Runs, temporary: Path) -> None:
    (temporary / "torch.py").write_text("raise ImportError('libcudart.so is gone')\n")
    runs.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(temporary), os.environ.get("PYTHONPATH"))))
    code, seen = doctor(runs)
    assert code == 2
    for name in ("messages", "weights-shm"):
        assert seen[name]["status"] == "problem"
        assert "ended with code 1: ImportError: libcudart.so is gone" in seen[name]["detail"]
        assert "pip check" in seen[name]["fix"]


def test_a_screen_of_80_columns(runs: Runs) -> None:
    """On a real terminal, of a shell that allows few open files."""
    ours, theirs = pty.openpty()
    command = ["sh", "-c", f"stty cols 80 rows 50; ulimit -n 300; exec '{OATLITE}' doctor"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=runs.environment | {"TERM": "dumb"}
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while piece := os.read(ours, 65536):
            text += piece
    os.close(ours)
    process.wait(LONG_S)
    lines = [line.rstrip() for line in text.decode().replace("\r\n", "\n").splitlines()]
    rows = [line for line in lines if line.startswith(("ok ", "warning ", "problem ", "skipped "))]
    assert len(rows) == 23
    assert max(map(len, lines)) <= 80
    limited = next(number for number, line in enumerate(lines) if "open-files" in line)
    assert lines[limited].startswith("warning") and "fix: " in lines[limited + 1]
    assert "warning" in lines[-1]


def test_help_is_fast_and_names_the_exit_codes() -> None:
    done = subprocess.run([str(OATLITE), "doctor", "--help"], capture_output=True, text=True, check=True)
    for words in ("--clean", "--json", "--run-dir", "5: problems of storage alone"):
        assert words in done.stdout

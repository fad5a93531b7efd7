"""What a run opens to others while it trains: sockets, folders, shared memory, secrets, and no pickle."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import zmq
from live import EngineMode
from runs import TEMPORARY, Inputs, Run, command, leftovers, train
from sockets import beyond_this_machine, bound_by, opened, sockets_of

from oatlite.messages import CandidateBatch, Hello, Record
from oatlite.messages.codec import encode

POLL_S = 0.1
SECRETS = {
    "OPENAI_API_KEY": "sk-canary-3d5c0f9b7a",
    "WANDB_API_KEY": "ca9a7e" + "0123456789abcdef01" + "fedcba9876543210",  # 40 characters, as wandb wants
    "HF_TOKEN": "hf_canary" + "QwErTyUiOpAsDfGhJkLzXcVb",
    "OATLITE_ORACLE_TOKEN": "canary-of-the-oracle-81f2",
}


class Unpickled:
    """Whoever unpickles it makes an empty file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


@dataclass(slots=True)
class Seen:
    """What was found at any time of a run: ``bound`` holds (protocol, address) of its internet sockets that anybody
    could speak to, ``local`` the names of its Unix sockets, ``private`` and ``segments`` modes by path."""

    run: Run
    trap: Path
    bound: set[tuple[str, str]] = field(default_factory=set)
    local: set[str] = field(default_factory=set)
    private: dict[Path, int] = field(default_factory=dict)
    segments: dict[str, int] = field(default_factory=dict)
    telling: set[str] = field(default_factory=set)
    num_attacked: int = 0
    leftovers: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------- looking


def processes() -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield entry


def of_the_run() -> list[Path]:
    """The processes of the run in /proc, whoever their parent is now, by where they put temporary files."""
    found = []
    for entry in processes():
        with contextlib.suppress(OSError):
            if f"\0TMPDIR={TEMPORARY}".encode() in b"\0" + (entry / "environ").read_bytes():
                found.append(entry)
    return found


def unix_names(inodes: set[str]) -> set[str]:
    """Names that the Unix sockets among ``inodes`` are bound to; an abstract one, open to all users, begins with @."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {row[7] for row in rows if len(row) > 7 and row[6] in inodes}


def shared_memory(members: list[Path]) -> dict[str, int]:
    """Modes of the files under /dev/shm that any of these processes has mapped or open."""
    found: dict[str, int] = {}
    for entry in members:
        paths = set()
        with contextlib.suppress(OSError):
            paths |= set(re.findall(r"(/dev/shm/\S+)$", (entry / "maps").read_text(), flags=re.MULTILINE))
        paths |= opened(entry)
        for path in paths:
            if path.startswith("/dev/shm/"):
                with contextlib.suppress(OSError):
                    found[path] = stat.S_IMODE(os.stat(path).st_mode)
    return found


def look(seen: Seen) -> None:
    members = of_the_run()
    inodes = sockets_of(members)
    seen.bound |= bound_by(inodes)
    seen.local |= unix_names(inodes)
    seen.segments |= shared_memory(members)
    for folder in TEMPORARY.glob("oatlite-*"):
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(OSError):
                seen.private[path] = path.lstat().st_mode
                if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS.values()):
                    seen.telling.add(str(path))
    for entry in processes():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            seen.telling |= {f"{entry}: {name}" for name, secret in SECRETS.items() if secret.encode() in words}


# --------------------------------------------------------------------------- attacking


def hostile(run_id: str, payload: bytes) -> list[list[bytes]]:
    """Frames with a pickle where it could be taken for something: alone, in a header, as an array, one too many."""
    whole = payload + bytes(-len(payload) % 4)
    batch = CandidateBatch(
        run_id=run_id,
        batch_id="1",
        policy_version=0,
        samplers=["policy"],
        response_tokens=np.frombuffer(whole, np.int32),
        response_lengths=np.array([len(whole) // 4], np.int32),
        sampler_logprobs=np.zeros(len(whole) // 4, np.float32),
        is_finished=np.array([True]),
        texts=[""],
        generate_s=0.0,
        sleep_s=0.0,
        wake_s=0.0,
    )
    hello = Hello(run_id=run_id, role="actor-0", pid=1)
    note = Record(run_id=run_id, kind="note", body=payload.hex())
    return [
        [payload],
        [b"", payload],
        [payload] * 8,
        [*(bytes(frame) for frame in encode(hello)), payload],
        [bytes(encode(hello)[0]).replace(b"actor-0", payload)],
        *([bytes(frame) for frame in encode(message)] for message in (batch, hello, note)),
    ]


@contextlib.contextmanager
def stranger(path: Path) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.IDENTITY, b"stranger")
    raw.connect(f"ipc://{path}")
    try:
        yield raw
    finally:
        raw.close(linger=60_000)
        context.term()


def attack(seen: Seen) -> int:
    """Send all of it to each socket that a process of the run takes messages at; returns to how many.

    Actors have none: they connect to their learner's.
    """
    payload = pickle.dumps(Unpickled(seen.trap))
    (folder,) = TEMPORARY.glob("oatlite-*")
    (run_id,) = re.findall(r"of run ([0-9a-f]+)", (seen.run.folder / "logs" / "learner-0.log").read_text())
    hubs = [path for path in folder.iterdir() if path.name == "control" or path.name.startswith("rollout-")]
    for path in hubs:
        with stranger(path) as raw:
            for frames in hostile(run_id, payload):
                raw.send_multipart(frames)
    return len(hubs)


# --------------------------------------------------------------------------- one run


def another_interface() -> str:
    """One that others can reach; without any, loopback."""
    return next((name for _, name in socket.if_nameindex() if name.startswith(("e", "w"))), "lo")


@pytest.fixture(scope="module")
def seen(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A run of two ranks and two actors that was watched from its start to its end, and attacked in the middle."""
    folder = tmp_path_factory.mktemp("watched")
    found = Seen(run=Run(folder=folder / "run", exit_code=-1, output=""), trap=folder / "unpickled")
    options = ("--set", "placement.learners=2", "--set", "placement.actors=2", "--wandb", "--max-prompts", "64")
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setitem(runs.ENVIRONMENT, name, secret)
        # What an operator has set for other programs must not open a port of ours to the network.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            patch.setitem(runs.ENVIRONMENT, name, another_interface())
        engine = EngineMode(folder / "mode")
        engine.set("slow")  # until it is attacked, so that several steps are still to come
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                command(llama, found.run.folder, *options),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=runs.ENVIRONMENT | engine.environment,
            )
        try:
            deadline = time.monotonic() + runs.DEADLINE_S
            while process.poll() is None:
                assert time.monotonic() < deadline, "the run does not end"
                look(found)
                metrics = found.run.folder / "metrics.jsonl"
                if not found.num_attacked and metrics.exists() and '"step"' in metrics.read_text():
                    found.num_attacked = attack(found)
                    engine.set("fast")
                time.sleep(POLL_S)
        finally:
            process.terminate()
            process.wait(60)
    found.run = Run(found.run.folder, process.returncode, (folder / "output").read_text(errors="replace"))
    found.leftovers = leftovers(found.run.folder)
    return found


def test_the_run_that_was_watched_and_attacked_ended_well_and_left_nothing(seen: Seen) -> None:
    assert seen.run.exit_code == 0, seen.run.output
    assert [record["step"] for record in seen.run.records("step")] == [1, 2, 3, 4]
    assert (seen.run.folder / "model" / "config.json").exists()
    assert seen.leftovers == []


def test_whatever_listens_listens_to_this_machine_alone(seen: Seen) -> None:
    assert ("tcp", "127.0.0.1") in seen.bound, "the ranks speak over it"
    assert beyond_this_machine(seen.bound) == set()


def test_sockets_of_ours_lie_in_a_folder_that_its_owner_alone_can_enter(seen: Seen) -> None:
    (folder,) = {path for path in seen.private if path.parent == TEMPORARY}
    assert seen.private[folder] == stat.S_IFDIR | 0o700
    sockets = {path.name for path, mode in seen.private.items() if stat.S_ISSOCK(mode) and path.parent == folder}
    assert {"control", "rollout-0", "rollout-1"} <= sockets
    assert {name for name in seen.local if not Path(name).is_relative_to(folder)} == set()
    assert {str(folder / name) for name in ("control", "rollout-0", "rollout-1")} <= seen.local
    specs = [mode for path, mode in seen.private.items() if path.suffix == ".json" and path.parent == folder]
    assert specs == [stat.S_IFREG | 0o600] * 4


def test_shared_memory_is_for_its_owner_alone_under_names_that_cannot_be_guessed(seen: Seen) -> None:
    ours = [Path(path).name for path in seen.segments if Path(path).name.startswith("oatlite-")]
    assert len(ours) == 2, "of each rank"
    random_parts = {re.fullmatch(r"oatlite-[0-9a-f]{12}-([0-9a-f]{16})", name)[1] for name in ours}  # type: ignore[index]
    assert len(random_parts) == 2
    assert {path: oct(mode) for path, mode in seen.segments.items() if mode & 0o077} == {}


def test_secrets_are_in_no_command_line_and_no_file(seen: Seen) -> None:
    assert seen.telling == set(), "while it ran"
    files = [path for path in seen.run.folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "wandb.log", "learner-1.log", "actor-1.log"} <= names
    assert any(name.endswith(".wandb") for name in names)
    written = {str(path): path.read_bytes() for path in files} | {"the screen": seen.run.output.encode()}
    for variable, secret in SECRETS.items():
        assert [path for path, content in written.items() if secret.encode() in content] == [], variable


def test_a_pickle_that_is_sent_to_a_run_is_dropped_with_a_warning_and_never_opened(seen: Seen) -> None:
    assert seen.num_attacked == 3
    assert not seen.trap.exists()
    payload = pickle.dumps(Unpickled(seen.trap))
    whole = len(hostile("0" * 12, payload))
    logs = [(seen.run.folder / "logs" / f"learner-{rank}.log").read_text() for rank in range(2)]
    for log in logs:
        assert len(re.findall(r"dropped an? \w+ message from stranger", log)) == whole
        assert "dropped a malformed message from stranger" in log
        assert "dropped a unexpected message from stranger: CandidateBatch" in log
    assert "dropped a malformed message from stranger" in seen.run.output, "by the supervisor"


def test_ranks_of_sft_meet_without_a_port_that_others_can_reach(llama: Inputs, tmp_path: Path) -> None:
    arguments = ["sft", "--model", str(llama.policy), "--data", str(llama.prompts), "--output", str(tmp_path / "out")]
    options = (
        "--learners",
        "2",
        "--batch-size",
        "8",
        "--epochs",
        "4",
        "--gpus",
        "0",
        "--max-tokens",
        "64",
        "--micro-batch-size",
        "4",
    )
    bound: set[tuple[str, str]] = set()
    environment = runs.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": another_interface()}
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen([runs.OATLITE, *arguments, *options], stdout=output, stderr=output, env=environment)
        try:
            deadline = time.monotonic() + runs.DEADLINE_S
            while process.poll() is None:
                assert time.monotonic() < deadline, "it does not end"
                bound |= bound_by(sockets_of(of_the_run()))
                time.sleep(POLL_S)
        finally:
            process.terminate()
            process.wait(60)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    assert ("tcp", "127.0.0.1") in bound, "the ranks speak over it"
    assert beyond_this_machine(bound) == set()


# --------------------------------------------------------------------------- code that comes with a model


@pytest.fixture
def tricky(llama: Inputs, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of a policy whose configuration names a class of its own, and the file that its code makes."""
    folder, trap = tmp_path / "tricky", tmp_path / "executed"
    shutil.copytree(llama.policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "tricky", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(trap)!r}, 'w').close()\n"
        "class Mine(LlamaConfig):\n    model_type = 'tricky'\n"
    )
    return folder, trap


def test_code_that_comes_with_a_model_is_not_executed(llama: Inputs, tricky: tuple[Path, Path], tmp_path: Path) -> None:
    folder, trap = tricky
    run = train(replace(llama, policy=folder), tmp_path / "runs" / "run")
    assert run.exit_code == 2, run.output
    assert str(folder) in run.output.strip().splitlines()[-1]
    assert not trap.exists()


def test_code_that_comes_with_a_model_is_executed_when_it_is_asked_for(
    tricky: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, trap = tricky
    code = "import sys; from oatlite.model_checks import check_language_model as check; "
    code += "check(sys.argv[1], '--model', trust_remote_code=sys.argv[2] == 'True')"
    environment = runs.ENVIRONMENT | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    for trust in (False, True):
        assert not trap.exists()
        subprocess.run([sys.executable, "-c", code, folder, str(trust)], env=environment, timeout=120, check=False)
    assert trap.exists()


# --------------------------------------------------------------------------- that the tests can fail


def test_the_pickle_does_what_it_is_for(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Unpickled(tmp_path / "trap"))).close()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("kind", "host", "found"),
    [
        (socket.SOCK_STREAM, "0.0.0.0", ("tcp", "0.0.0.0")),
        (socket.SOCK_STREAM, "127.0.0.1", ("tcp", "127.0.0.1")),
        (socket.SOCK_STREAM, "::", ("tcp6", "::")),
        (socket.SOCK_STREAM, "::1", ("tcp6", "::1")),
        (socket.SOCK_DGRAM, "0.0.0.0", ("udp", "0.0.0.0")),
    ],
)
def test_a_socket_that_waits_is_found(kind: int, host: str, found: tuple[str, str]) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as waiting:
        try:
            waiting.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        if kind == socket.SOCK_STREAM:
            waiting.listen()
        assert found in bound_by(sockets_of([Path("/proc/self")]))


def test_a_name_that_every_user_can_connect_to_is_found() -> None:
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.bind(f"\0oatlite-abstract-{os.getpid()}")
        assert f"@oatlite-abstract-{os.getpid()}" in unix_names(sockets_of([Path("/proc/self")]))


def test_a_segment_of_a_process_is_found(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"{tmp_path.name}-{os.getpid()}"
    with path.open("xb"):
        path.chmod(0o644)
        try:
            assert shared_memory([Path("/proc/self")]).get(str(path)) == 0o644
        finally:
            path.unlink()

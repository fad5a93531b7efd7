"""``oatlite serve-oracle``: what it needs is checked, the server started, announced once it answers, and stopped."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from oatlite.config.oracle_names import PAIRRM, kind_of
from oatlite.config.schema import OracleConfig
from oatlite.errors import (
    BY_EXIT_CODE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    ConfigError,
    OracleError,
)
from oatlite.hardware import gpu_names, usable_cores
from oatlite.launcher import RUN_VARIABLE, LocalLauncher, Worker
from oatlite.oracles.feedback import PATH
from oatlite.oracles.server_settings import FAILED, READY, TOKEN, ServerSettings, WorkerSettings, environment

POLL_S = 0.1
STOP_S = 10.0
"""Requests that are being answered when the server is told to stop have so long to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What was typed after ``oatlite serve-oracle``; ``devices`` is "cpu", numbers of GPUs with commas, or None."""

    oracle: OracleConfig
    devices: str | None
    workers: int | None
    devices_per_worker: int
    host: str
    port: int
    max_batch: int
    max_wait_ms: int
    timeout_s: float
    max_request_mib: int
    allow_anyone: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker's model lies: ``device`` for torch, and the GPUs that the process sees."""

    device: str
    mask: str


def serve(options: ServeOptions, announce: Callable[[str], None]) -> int:
    """Serve until Ctrl-C (130) or SIGTERM (143), and give that exit code; ``announce`` gets one line, when it answers.

    Raises ConfigError for what cannot be served, OracleError when the server dies.
    """
    (name,) = options.oracle.path
    name = PAIRRM.get(name, name)
    if kind_of(name) in ("remote", "judge"):
        raise ConfigError(
            f"the oracle {name} is a server already", "type --model with a reward model or file.py:function"
        )
    places = place(options, name, gpu_names())
    address = _address(options.host)
    if not ipaddress.ip_address(address).is_loopback and not os.environ.get(TOKEN) and not options.allow_anyone:
        raise ConfigError(
            f"{options.host} can be reached from other machines, and there is no token",
            f"set the environment variable {TOKEN}, or type --allow-anyone",
        )
    _check_free(address, options.port)
    with LocalLauncher("sem.oatlite-") as launcher, _Signals() as signals:
        settings = _settings(options, name, places, address, launcher.private_dir)
        process = subprocess.Popen(
            [sys.executable, "-m", "oatlite.oracles.server", f"/oatlite-{launcher.run_id}"],
            env=environment(os.environ) | dict.fromkeys(("TMPDIR", RUN_VARIABLE), str(launcher.private_dir)),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        server = launcher.adopt(process, Path("/dev/stderr"))
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(settings)).encode())
        process.stdin.close()
        if _wait_until_ready(server, settings, launcher.private_dir, signals):
            url = f"http://{'127.0.0.1' if address == '0.0.0.0' else options.host}:{options.port}{PATH}"
            workers = "1 worker" if len(places) == 1 else f"{len(places)} workers"
            announce(f"serving {name} at {url} with {workers}")
        while signals.exit_code is None:
            _raise_failure(server, launcher.private_dir)
            time.sleep(POLL_S)
        process.terminate()  # it alone: it then stops the others in good order
        server.wait(STOP_S)
        return signals.exit_code


def place(options: ServeOptions, name: str, gpus: list[str]) -> list[Place]:
    """A place for each worker. Raises ConfigError for devices that are not here or do not go with each other."""
    devices = options.devices
    if devices is None and (kind_of(name) == "function" or not gpus):
        devices = "cpu"
    if devices == "cpu":
        if options.devices_per_worker > 1:
            raise ConfigError("a CPU is one device, and --devices-per-worker asks for more", "leave it out")
        return [Place("cpu", "")] * (options.workers or 1)
    if options.workers is not None:
        raise ConfigError("--workers counts workers on a CPU", "leave it out: each GPU has one, or type --devices cpu")
    numbers = list(range(len(gpus))) if devices is None else _numbers(devices)
    for number in numbers:
        if number >= len(gpus):
            here = f"GPUs 0 to {len(gpus) - 1} are here" if gpus else "there is no GPU here"
            raise ConfigError(
                f"--devices {devices}: {here}", "type --devices cpu" if not gpus else "type some of these"
            )
    size = options.devices_per_worker
    if len(numbers) % size:
        raise ConfigError(
            f"{len(numbers)} GPUs cannot be shared out {size} to a worker", "give a multiple with --devices"
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [part.strip() for part in seen.split(",")] if seen else [str(number) for number in range(len(gpus))]
    groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    device = "cuda" if size == 1 else "auto"
    return [Place(device, ",".join(names[number] for number in group)) for group in groups]


def _numbers(devices: str) -> list[int]:
    parts = [part.strip() for part in devices.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--devices {devices} is no list of GPUs", "type numbers with commas, as in 0,1, or cpu")
    return [int(part) for part in parts]


def _settings(options: ServeOptions, name: str, places: list[Place], address: str, private_dir: Path) -> ServerSettings:
    oracle = options.oracle.model_copy(update={"path": (name,)}).model_dump(mode="json")
    threads = max(1, len(usable_cores()) // len(places))
    return ServerSettings(
        address=address,
        port=options.port,
        timeout_s=options.timeout_s,
        max_request_bytes=options.max_request_mib << 20,
        max_batch=options.max_batch,
        max_wait_ms=options.max_wait_ms,
        folder=str(private_dir / "mosec"),
        workers=[
            WorkerSettings(
                index=index,
                device=where.device,
                mask=where.mask,
                threads=threads,
                oracle=oracle,
                notes=str(private_dir),
            )
            for index, where in enumerate(places)
        ],
    )


def _address(host: str) -> str:
    """The IPv4 address of ``host``: Mosec listens on no other."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"--host {host} is no IPv4 address or name of this machine", "type --host 127.0.0.1"
        ) from None
    return str(found[0][4][0])


def _check_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            why = os.strerror(error.errno or 0).lower()
            raise ConfigError(f"cannot listen at {address}:{port}: {why}", "type another --port or --host") from None


class _Signals:
    """Remembers the first SIGINT or SIGTERM as an exit code, while it is entered."""

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.exit_code = self.exit_code or (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)


def _wait_until_ready(server: Worker, settings: ServerSettings, notes: Path, signals: _Signals) -> bool:
    """Whether all workers have their oracle, and HTTP answers; False when we were told to stop before."""
    while signals.exit_code is None:
        _raise_failure(server, notes)
        if len(list(notes.glob(f"{READY}*"))) == len(settings.workers) and _answers(settings):
            return True
        time.sleep(POLL_S)
    return False


def _raise_failure(server: Worker, notes: Path) -> None:
    """What a worker left as the reason why it could not start, or that the server has ended."""
    has_ended = server.exit_code() is not None
    for note in sorted(notes.glob(f"{FAILED}*")):
        server.signal(signal.SIGKILL)  # before Mosec remarks on it
        code, message, fix = json.loads(note.read_text())
        raise BY_EXIT_CODE[code](message, fix)
    if has_ended:
        raise OracleError("the server has ended by itself", "see what it said above")


def _answers(settings: ServerSettings) -> bool:
    host = "127.0.0.1" if settings.address == "0.0.0.0" else settings.address
    connection = http.client.HTTPConnection(host, settings.port, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

"""Claim: on one GPU a weight sync of a network of a billion parameters in bfloat16 takes at most as long as ten plain
copies of it, and 100 ms in all; 50 syncs leave memory flat; and a pair with a shared prompt is learned from no slower
than two plain sequences.

Finds out what is there and measures what can be: each row in a process of its own, with a time limit, so that what is
missing or goes wrong costs that row alone. The table comes last, whatever happened. It needs a GPU, this checkout and
the Python that runs it; what rows lack (vLLM, DeepSpeed, ...) can be brought as wheels.

    python benchmarks/gpu.py [--minutes 8] [--wheels FOLDER] [--keep FOLDER] [--rows weight-sync,step]

``--device cpu --tiny`` rehearses it: all but the calls of CUDA, at a size whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from report import machine, save  # noqa: E402

END_GRACE_S = 12.0
RESERVE_S = 20.0
POLL_S = 0.2
TAIL_LINES = 25
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
MODULE_OF = {"pyzmq": "zmq"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``function`` is ``module:name`` of ``gpu_rows``; ``needs`` are packages without which it is left out, as it
    is with less than ``least_s`` to go."""

    name: str
    function: str
    limit_s: float
    least_s: float = 15.0
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


HUGGING_FACE = ("torch", "transformers", "msgpack")
RUN = (*HUGGING_FACE, "pydantic", "pyzmq")
VLLM = (*RUN, "vllm")
ROWS = (
    Row(name="machine", function="machine:machine", limit_s=90, needs=("torch",)),
    Row(name="weight-sync", function="weight_sync:weight_sync", limit_s=100, needs=HUGGING_FACE),
    Row(name="pair-forward", function="forward:pair_forward", limit_s=100, needs=HUGGING_FACE),
    Row(name="step", function="step:step_hugging_face", limit_s=150, needs=RUN),
    Row(name="step-vllm", function="step:step_vllm", limit_s=180, needs=VLLM),
    Row(name="sleep", function="sleep:sleep_and_wake", limit_s=120, needs=VLLM),
    Row(
        name="expandable-segments",
        function="weight_sync:refusal",
        limit_s=60,
        needs=HUGGING_FACE,
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
    Row(name="log-probabilities", function="forward:log_probabilities", limit_s=60, needs=HUGGING_FACE),
    Row(name="tests", function="checks:gpu_tests", limit_s=120, needs=(*HUGGING_FACE, "pytest")),
    Row(name="doctor", function="checks:doctor", limit_s=60, needs=("torch", "pydantic", "pyzmq")),
    Row(name="train", function="train:train", limit_s=300, least_s=60, needs=(*VLLM, "deepspeed", "datasets")),
)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """``status`` is ``done``, ``failed``, ``left out`` or ``out of time``; what was found before it ended stands."""

    row: str
    status: str
    why: str = ""
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)


def run_row(row: Row, options: argparse.Namespace, environment: dict[str, str], limit_s: float, log: Path) -> Outcome:
    """The row in a process of its own, ended when its time is over, with all that it has started."""
    told = log.with_suffix(".told")
    command = [sys.executable, __file__, "--row", row.name, "--told", str(told), "--device", options.device]
    command += ["--ceilings", ",".join(map(str, options.ceilings))] if options.ceilings else []
    command += ["--tiny"] if options.tiny else []
    status, why = "done", ""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**environment, **row.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status, why = "out of time", f"ended after {limit_s:.0f} s"
        else:
            if code:
                status, why = "failed", f"exit code {code}: {last_words(log)}"
        finally:
            end_group(process)
    findings = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    return Outcome(row=row.name, status=status, why=why, seconds=time.monotonic() - start, findings=findings)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """First politely, so that what owns shared memory or other processes can clear up."""
    for number, grace_s in ((signal.SIGTERM, END_GRACE_S), (signal.SIGKILL, END_GRACE_S)):
        if not running(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + grace_s
        while running(process) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def running(process: subprocess.Popen[bytes]) -> bool:
    """Whether it, or another process of its group, has not ended."""
    process.poll()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                return True
    return False


def last_words(log: Path) -> str:
    """The last line that says something, which of a traceback is the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("oatlite.errors")]
    return (errors or lines or ["nothing was said"])[-1][:300]


def missing(row: Row) -> list[str]:
    """Of what a row needs, what this Python lacks."""
    return [package for package in row.needs if importlib.util.find_spec(MODULE_OF.get(package, package)) is None]


def run_all(
    options: argparse.Namespace, environment: dict[str, str], logs: Path, outcomes: list[Outcome], deadline: float
) -> None:
    """Adds to ``outcomes``, which has what is known also when this is broken off."""
    for row in (row for row in ROWS if not options.rows or row.name in options.rows):
        left_s = deadline - time.monotonic()
        if lacking := missing(row):
            outcome = Outcome(row=row.name, status="left out", why=f"not installed: {', '.join(lacking)}")
        elif left_s < row.least_s:
            outcome = Outcome(row=row.name, status="left out", why=f"{max(0.0, left_s):.0f} s were left")
        else:
            outcome = run_row(row, options, environment, min(row.limit_s, left_s), logs / f"{row.name}.log")
        outcomes.append(outcome)
        print(f"{row.name}: {outcome.status} {outcome.why} ({outcome.seconds:.1f} s)", flush=True)
        if outcome.status in ("failed", "out of time"):
            lines = (logs / f"{row.name}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print(textwrap.indent("\n".join(line[:300] for line in lines), "    "), flush=True)
        if row.name == "machine":
            options.ceilings = ceilings(outcome)


def ceilings(outcome: Outcome) -> list[float]:
    """Bytes and operations a second, where both were measured."""
    numbers = {key: value for finding in outcome.findings for key, value in finding["numbers"].items()}
    keys = ("bytes_per_s", "operations_per_s")
    return [numbers[key] for key in keys] if all(key in numbers for key in keys) else []


def table(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for outcome in outcomes:
        cells = [(finding["what"], verdict(finding) + finding["said"]) for finding in outcome.findings]
        if outcome.status != "done":
            cells.append((outcome.status.upper(), outcome.why))
        for number, (what, said) in enumerate(cells or [("done", "and found nothing to say")]):
            lines.append(f"{outcome.row if number == 0 else '':<20} {what:<24} {said}")
    return "\n".join(lines)


def verdict(finding: dict[str, Any]) -> str:
    return {None: "", True: "[met] ", False: "[MISSED] "}[finding["is_met"]]


def child_environment(folder: Path, wheels: Path | None) -> dict[str, str]:
    """Where rows find this checkout, its command under the name that it installs as, and what was brought along.

    An allocator that somebody has set up is put aside: rows choose their own.
    """
    (folder / "oatlite_cli").symlink_to(ROOT / "cli")
    describe(folder)
    path = [str(ROOT), str(HERE), str(folder)]
    if wheels is not None:
        unpack(wheels, folder / "wheels")
        path.append(str(folder / "wheels"))
        sys.path.insert(0, str(folder / "wheels"))
        importlib.invalidate_caches()
    path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | changes | offline


def describe(folder: Path) -> None:
    """Put what an installation would know of itself on the path: what oatlite needs, which it looks up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = list(project["dependencies"])
    needs += [f'{need}; extra == "{extra}"' for extra, of in project["optional-dependencies"].items() for need in of]
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines.append(f"Requires-Python: {project['requires-python']}")
    lines += [f"Provides-Extra: {extra}" for extra in project["optional-dependencies"]]
    lines += [f"Requires-Dist: {need}" for need in needs]
    target = folder / f"{project['name']}-{project['version']}.dist-info"
    target.mkdir()
    (target / "METADATA").write_text("\n".join(lines) + "\n")


def unpack(wheels: Path, target: Path) -> None:
    """A wheel is an archive of what belongs on the path, and needs no pip for that."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                path = Path(archive.extract(info, target))
                if mode := info.external_attr >> 16 & 0o777:
                    path.chmod(mode | 0o600)


def measure(options: argparse.Namespace) -> int:
    """The process of one row."""
    from gpu_rows.scale import Scale, Tell

    bytes_per_s, operations_per_s = map(float, options.ceilings.split(",")) if options.ceilings else (None, None)
    scale = Scale(device=options.device, tiny=options.tiny, bytes_per_s=bytes_per_s, operations_per_s=operations_per_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    row = next(row for row in ROWS if row.name == options.row)
    module, _, name = row.function.partition(":")
    try:
        getattr(importlib.import_module(f"gpu_rows.{module}"), name)(scale, Tell(options.told))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all rows together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a hundred thousand parameters")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="these alone")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use beside what is installed")
    parser.add_argument("--keep", type=Path, help="folder for the logs and, in gpu.json, all figures")
    parser.add_argument("--list", action="store_true", help="name the rows")
    for hidden in ("--row", "--told", "--ceilings"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.rows) - {row.name for row in ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; --list names them")
    if options.told:
        options.told = Path(options.told)
    return options


def main() -> int:
    options = arguments()
    if options.list:
        for row in ROWS:
            print(f"{row.name:<20} at most {row.limit_s:.0f} s, needs {', '.join(row.needs)}")
        return 0
    if options.row:
        return measure(options)
    deadline = time.monotonic() + 60 * options.minutes - RESERVE_S
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as name:
        folder = Path(name)
        try:
            run_all(options, child_environment(folder, options.wheels), folder, outcomes, deadline)
        except KeyboardInterrupt:
            print("broken off; what is known follows")
        if options.keep is not None:
            keep(options.keep, folder, outcomes)
    names = [f["numbers"]["name"] for o in outcomes for f in o.findings if (o.row, f["what"]) == ("machine", "gpu")]
    gpu = names[0] if names else "no GPU"
    print(f"\n{table(outcomes)}\n\n{gpu}; {machine()}")
    if options.tiny:
        print("a rehearsal: its figures mean nothing, and are not kept")
    elif names:
        saved = save(f"gpu-{gpu.lower().replace(' ', '-')}", gpu=gpu, rows=as_json(outcomes))
        print(saved)
        if options.keep is not None:
            shutil.copy(saved, options.keep)
    missed = [f"{o.row}: {f['what']}" for o in outcomes for f in o.findings if f["is_met"] is False]
    failed = [o.row for o in outcomes if o.status in ("failed", "out of time")]
    left_out = [o.row for o in outcomes if o.status == "left out"]
    print(f"missed: {'; '.join(missed) or 'none'}. failed: {', '.join(failed) or 'none'}. ", end="")
    print(f"left out: {', '.join(left_out) or 'none'}.")
    return 1 if missed or failed else 0


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"row": o.row, "status": o.status, "why": o.why, "seconds": o.seconds, "findings": o.findings} for o in outcomes
    ]


def keep(target: Path, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """One log of all rows, and the figures."""
    target.mkdir(parents=True, exist_ok=True)
    with (target / "gpu.log").open("wb") as together:
        for log in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime):
            together.write(f"=== {log.stem}\n".encode())
            with log.open("rb") as one:
                shutil.copyfileobj(one, together)
    (target / "gpu.json").write_text(json.dumps(as_json(outcomes), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

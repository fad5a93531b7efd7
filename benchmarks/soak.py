"""Claim: a long run stays as it is. Memory, open files and segments are flat, and kills change nothing.

Two runs of the demo's task with a policy of one layer, two actors and one learner: one undisturbed, and one in which an
actor is killed every so often. Memory (RSS), open files and the run's own segments of shared memory are sampled while
they run; slopes are over the second half of what was sampled of a process, by least squares. What is new grows at
first: an actor that did not live for long is held against the undisturbed one of its role at the same age, all others
against a bound of their own. The final weights of both must be the same bytes.

    python benchmarks/soak.py [--steps 1000] [--kill-every 50]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from report import machine, save
from safetensors.torch import load_file

from oatlite.demo.build import Recipe, ensure_demo

RECIPE = Recipe(num_train=256, num_test=8, hidden_size=64, num_layers=1, policy_rows=200, reward_posts=60)
PER_STEP = 8
MAX_SLOPE_MIB = 1.0  # per 100 steps, of a process
MAX_FILES_SLOPE = 0.1  # per 100 steps
MIN_SPAN = 200  # steps after which a slope is held against these
MAX_MORE_MIB = 64.0  # of a process that lived for less, than the undisturbed one at its age
MIN_SAMPLES = 4
T = TypeVar("T")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Watched:
    """What was seen of a run, each sample with the step that it was taken at: of processes by role and number."""

    memory: dict[tuple[str, int], list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    files: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    segments: list[tuple[int, int]] = field(default_factory=list)
    num_kills: int = 0
    seconds: float = 0.0


def tree(root: int) -> dict[str, int]:
    """The run's processes by role: the supervisor, and those that are started with a role's file."""
    parents, words = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words[int(entry.name)] = (entry / "cmdline").read_text()
    found = {"supervisor": root}
    for pid, command in words.items():
        role = re.search(r"/((?:actor|learner)-\d+)\.json", command)
        if role and parents[pid] == root:
            found[role[1]] = pid
    return found


def look(watched: Watched, root: int, step: int, run_id: str) -> dict[str, int]:
    processes = tree(root)
    for role, pid in processes.items():
        with contextlib.suppress(OSError):
            watched.memory[role, pid].append(
                (step, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES)
            )
            watched.files[role, pid].append((step, len(list(Path(f"/proc/{pid}/fd").iterdir()))))
    watched.segments.append((step, len(list(Path("/dev/shm").glob(f"*oatlite-{run_id}-*")))))
    return processes


def soak(folder: Path, name: str, num_steps: int, kill_every: int | None) -> Watched:
    """Run to the end, and kill the actors in turn each ``kill_every`` steps."""
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--gpus", "0", "--ui", "plain", "--actors", "2"]
    paths = ensure_demo(lambda *_: None, RECIPE)
    command += ["--model", str(paths.policy), "--oracle", str(paths.reward_model), "--prompts", str(paths.prompts)]
    command += ["--run-dir", str(folder), "--name", name, "--eval-prompts", "0", "--algo", "dpo", "--lr", "1e-4"]
    command += ["--prompts-per-step", str(PER_STEP), "--max-new-tokens", "12", "--temperature", "1.0"]
    command += [
        "--epochs",
        str(num_steps * PER_STEP // RECIPE.num_train + 1),
        "--max-queries",
        str(num_steps * PER_STEP),
    ]
    started, watched = time.monotonic(), Watched()
    with (folder / f"{name}.txt").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    metrics, step, killed_at = folder / name / "metrics.jsonl", 0, 0
    while run.poll() is None:
        time.sleep(0.5)
        if metrics.exists():
            step = metrics.read_text().count('"kind": "step"')
        if not 0 < step < num_steps:  # still starting, or ending
            continue
        run_id = re.findall(r"of run ([0-9a-f]+)", (folder / name / "logs" / "learner-0.log").read_text())[0]
        processes = look(watched, run.pid, step, run_id)
        due = kill_every is not None and step >= killed_at + kill_every
        if due and len(processes) == 4:
            os.kill(processes[f"actor-{watched.num_kills % 2}"], signal.SIGKILL)
            watched.num_kills, killed_at = watched.num_kills + 1, step
            print(f"  step {step}: killed an actor", flush=True)
    watched.seconds = time.monotonic() - started
    if run.returncode:
        raise SystemExit((folder / f"{name}.txt").read_text()[-2000:])
    return watched


def slope(samples: list[tuple[int, float]], unit: float = 2**20) -> float:
    """MiB, or of another unit, per 100 steps over the second half."""
    half = second_half(samples)
    steps, values = np.array(half, np.float64).T
    return float(np.polyfit(steps, values / unit, 1)[0] * 100)


def second_half(samples: list[tuple[int, T]]) -> list[tuple[int, T]]:
    return samples[len(samples) // 2 :]


@dataclass(frozen=True, slots=True)
class Row:
    """A process over the second half of its samples: last MiB, MiB and open files per 100 steps, and the numbers of
    open files. ``undisturbed`` are the MiB of the undisturbed process at its age, where it is new."""

    mib: float
    slope: float
    files: list[int]
    files_slope: float
    undisturbed: float | None

    @property
    def is_flat(self) -> bool:
        if self.undisturbed is not None:
            return self.mib <= self.undisturbed + MAX_MORE_MIB
        return self.files_slope <= MAX_FILES_SLOPE and self.slope <= MAX_SLOPE_MIB


def rows(watched: Watched, undisturbed: Watched) -> dict[str, Row]:
    """By role and, where there were several in turn, process number."""
    found = {}
    for (role, pid), samples in watched.memory.items():
        if len(samples) < MIN_SAMPLES:
            continue
        is_one_of_several = sum(other == role for other, _ in watched.memory) > 1
        span = samples[-1][0] - samples[0][0]
        found[f"{role} ({pid})" if is_one_of_several else role] = Row(
            mib=samples[-1][1] / 2**20,
            slope=slope(samples),
            files=sorted({count for _, count in second_half(watched.files[role, pid])}),
            files_slope=slope(watched.files[role, pid], unit=1),
            undisturbed=at_age(undisturbed, role, span) if is_one_of_several and span < MIN_SPAN else None,
        )
    return found


def at_age(watched: Watched, role: str, span: int) -> float:
    """MiB of the one process of a role, ``span`` steps after it was first seen."""
    (samples,) = (samples for (other, _), samples in watched.memory.items() if other == role)
    return next(value for step, value in samples if step - samples[0][0] >= span) / 2**20


def segments(watched: Watched) -> list[int]:
    """How many there were of the run's own, over the second half: flat is a single number."""
    return sorted({count for _, count in second_half(watched.segments)})


def is_flat(watched: Watched, undisturbed: Watched) -> bool:
    """Whether nothing grows, and the processes that live through a run are among those that were looked at."""
    known = rows(watched, undisturbed)
    return {"supervisor", "learner-0"} <= set(known) and (
        len(segments(watched)) == 1 and all(row.is_flat for row in known.values())
    )


def show(name: str, watched: Watched, undisturbed: Watched) -> None:
    print(f"{name:<24} {'MiB':>8} {'MiB per 100 steps':>18} {'open files':>14}")
    for process, row in rows(watched, undisturbed).items():
        print(
            f"  {process:<22} {row.mib:>8.0f} {row.slope:>18.2f} {'-'.join(map(str, row.files)):>14}"
            + ("" if row.undisturbed is None else f"  (new; undisturbed at that age {row.undisturbed:.0f} MiB)")
        )
    print(f"  segments {'-'.join(map(str, segments(watched)))}")


def records(run: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "perf"} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kill-every", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = place
        plain = soak(folder, "plain", given.steps, None)
        disturbed = soak(folder, "disturbed", given.steps, given.kill_every)
        weights = [load_file(folder / name / "model" / "model.safetensors") for name in ("plain", "disturbed")]
        is_same = all(weights[0][name].equal(weights[1][name]) for name in weights[0] | weights[1])
        num_steps = sum(record["kind"] == "step" for record in records(folder / "plain"))
        same_records = records(folder / "plain") == records(folder / "disturbed")
    show("undisturbed", plain, plain)
    show(f"with {disturbed.num_kills} kills", disturbed, plain)
    print(f"{num_steps} steps in {plain.seconds:.0f} s, with the kills in {disturbed.seconds:.0f} s")
    print(f"final weights {'equal' if is_same else 'DIFFER'}, records {'equal' if same_records else 'DIFFER'}")
    met = is_flat(plain, plain) and is_flat(disturbed, plain) and is_same and same_records
    print(f"{machine()}; {'met' if met else 'MISSED'}")
    print(
        save(
            "soak",
            steps=num_steps,
            kills=disturbed.num_kills,
            processes={
                name: {process: asdict(row) for process, row in rows(watched, plain).items()}
                for name, watched in (("plain", plain), ("disturbed", disturbed))
            },
            segments=[segments(plain), segments(disturbed)],
            weights_equal=is_same,
            records_equal=same_records,
            seconds=[plain.seconds, disturbed.seconds],
        )
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

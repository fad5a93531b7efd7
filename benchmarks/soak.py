"""Claim: a long run stays as it is. Memory, open files and segments are flat, and kills change nothing.

Two runs of the demo's task with a policy of one layer, two actors and one learner: one undisturbed, and one in which an
actor is killed every so often. Memory (RSS), open files and shared-memory segments are sampled while they run; slopes
are over the second half of the undisturbed run, by least squares. The final weights of both must be the same bytes.

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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from report import machine, save
from safetensors.torch import load_file

from oatlite.demo.build import Recipe, ensure_demo

RECIPE = Recipe(num_train=256, num_test=8, hidden_size=64, num_layers=1, policy_rows=200, reward_posts=60)
PER_STEP = 8
MAX_SLOPE_MIB = 1.0  # per 100 steps, of a process
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Watched:
    """What was seen of a run, each sample with the step that it was taken at."""

    memory: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    files: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
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


def look(watched: Watched, root: int, step: int) -> dict[str, int]:
    processes = tree(root)
    for role, pid in processes.items():
        with contextlib.suppress(OSError):
            watched.memory[role].append((step, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES))
            watched.files[role].append((step, len(list(Path(f"/proc/{pid}/fd").iterdir()))))
    watched.segments.append((step, len(list(Path("/dev/shm").glob("oatlite-*")))))
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
        processes = look(watched, run.pid, step)
        due = kill_every is not None and step >= killed_at + kill_every
        if due and len(processes) == 4:
            os.kill(processes[f"actor-{watched.num_kills % 2}"], signal.SIGKILL)
            watched.num_kills, killed_at = watched.num_kills + 1, step
            print(f"  step {step}: killed an actor", flush=True)
    watched.seconds = time.monotonic() - started
    if run.returncode:
        raise SystemExit((folder / f"{name}.txt").read_text()[-2000:])
    return watched


def slope(samples: list[tuple[int, float]]) -> float:
    """MiB per 100 steps over the second half."""
    half = samples[len(samples) // 2 :]
    steps, values = np.array(half, np.float64).T
    return float(np.polyfit(steps, values / 2**20, 1)[0] * 100)


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
    slopes = {role: slope(samples) for role, samples in plain.memory.items()}
    files = {role: sorted({count for _, count in s[len(s) // 2 :]}) for role, s in plain.files.items()}
    segments = sorted({count for _, count in plain.segments[len(plain.segments) // 2 :]})
    print(f"{'process':<12} {'MiB':>8} {'MiB per 100 steps':>18} {'open files':>14}")
    for role, value in slopes.items():
        last = plain.memory[role][-1][1] / 2**20
        print(f"{role:<12} {last:>8.0f} {value:>18.2f} {'-'.join(map(str, files[role])):>14}")
    print(
        f"segments {segments}; {num_steps} steps in {plain.seconds:.0f} s, with {disturbed.num_kills} kills in "
        f"{disturbed.seconds:.0f} s"
    )
    print(f"final weights {'equal' if is_same else 'DIFFER'}, records {'equal' if same_records else 'DIFFER'}")
    is_flat = all(value <= MAX_SLOPE_MIB for value in slopes.values())
    met = is_flat and is_same and same_records and all(len(counts) <= 2 for counts in files.values())
    print(f"{machine()}; {'met' if met else 'MISSED'}")
    print(
        save(
            "soak",
            steps=num_steps,
            kills=disturbed.num_kills,
            slopes_mib_per_100_steps=slopes,
            open_files=files,
            segments=segments,
            weights_equal=is_same,
            records_equal=same_records,
            seconds=[plain.seconds, disturbed.seconds],
        )
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

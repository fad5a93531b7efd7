"""Claim: with ``--async`` a step costs at most 1.1 times the longer of sampling and learning.

Real processes, engines, sockets and weight syncs, with work that sleeps instead of computing, so that the number of
cores does not matter: each step of vLLM's engine sleeps, and so does each micro-batch of the learner. The same run in
turns stands beside it. The models have one layer, so that what is computed all the same is small.

    python benchmarks/async_overlap.py [--steps 12] [--learn-s 1.0]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from report import machine, save

from oatlite.demo.build import Recipe, ensure_demo

LIMIT = 1.1
WARM_UP = 2
MICRO_BATCHES = 4
RECIPE = Recipe(num_train=256, num_test=8, hidden_size=64, num_layers=1, policy_rows=200, reward_posts=60)
HERE = Path(__file__).parent
IN_EVERY_PROCESS = HERE.parent / "tests" / "integration" / "in_every_process"


def run(folder: Path, name: str, num_steps: int, learn_s: float, *more: str) -> list[dict[str, Any]]:
    """What the steps of a run measured, without the first ones."""
    paths = ensure_demo(lambda *_: None, RECIPE)
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--gpus", "0", "--ui", "plain", *more]
    command += ["--model", str(paths.policy), "--oracle", str(paths.reward_model), "--prompts", str(paths.prompts)]
    command += ["--run-dir", str(folder), "--name", name, "--eval-prompts", "0", "--max-new-tokens", "12"]
    command += ["--prompts-per-step", str(4 * MICRO_BATCHES), "--micro-batch-size", "4", "--epochs", "10"]
    command += ["--max-queries", str(4 * MICRO_BATCHES * (num_steps + WARM_UP)), "--save-every", "1000"]
    command += ["--algo", f"{HERE / 'sleeping_algorithm.py'}:SleepingSimPO"]
    command += ["--set", f"algorithm.options.seconds={learn_s}"]
    mode = folder / "mode"
    mode.write_text("slow")
    path = os.pathsep.join(filter(None, [str(IN_EVERY_PROCESS), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"ENGINE_MODE": str(mode), "PYTHONPATH": path}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"][WARM_UP:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learn-s", type=float, default=1.0, help="seconds that each of four micro-batches sleeps")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, more in (("in turns", ()), ("ahead", ("--async",))):
            steps = run(Path(name), kind.replace(" ", "-"), arguments.steps, arguments.learn_s, *more)
            times = {key: median(step["perf"][key] for step in steps) for key in ("step_s", "learn_s", "sync_s")}
            times["sample_s"] = median(step["perf"]["generate_s"] + step["perf"]["score_s"] for step in steps)
            found[kind] = times | {"ratio": times["step_s"] / max(times["sample_s"], times["learn_s"])}
    print(f"{'':<10}{'sampling':>10}{'learning':>10}{'sync':>8}{'step':>8}   of the longer")
    for kind, times in found.items():
        print(
            f"{kind:<10}{times['sample_s']:>9.2f}s{times['learn_s']:>9.2f}s{times['sync_s']:>7.2f}s"
            f"{times['step_s']:>7.2f}s{times['ratio']:>10.2f}x"
        )
    is_met = found["ahead"]["ratio"] <= LIMIT
    print(f"{machine()}; at most {LIMIT}x: {'met' if is_met else 'MISSED'}")
    print(save("async_overlap", limit=LIMIT, steps=arguments.steps, found=found))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

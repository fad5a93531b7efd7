"""Claim: of a step's wall time at most 5 % is neither generation, scoring, learning nor sync.

Runs the demo (steady state: the first steps are left out) and adds up what the run itself measured.

    python benchmarks/step_breakdown.py [--steps 12] [--run RUN_FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import machine, save

LIMIT = 0.05
WARM_UP = 2
STAGES = ("generate_s", "score_s", "learn_s", "sync_s")


def run_demo(num_steps: int, folder: Path) -> Path:
    oatlite = Path(sys.executable).with_name("oatlite")
    per_step = 64
    bounds = ["--prompts-per-step", str(per_step), "--max-prompts", str(per_step * (num_steps + WARM_UP))]
    arguments = ["--gpus", "0", "--ui", "plain", "--run-dir", str(folder), "--name", "demo", "--eval-every", "1000"]
    subprocess.run([str(oatlite), "train", *arguments, *bounds], check=True)
    return folder / "demo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--run", type=Path, help="read this finished run instead of starting one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = arguments.run or run_demo(arguments.steps, Path(name))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    perf = [record["perf"] for record in records if record["kind"] == "step"][WARM_UP:]
    total = sum(p["step_s"] for p in perf)
    shares = {stage: sum(p[stage] for p in perf) / total for stage in STAGES}
    rest = 1 - sum(shares.values())
    for stage, share in shares.items():
        print(f"{stage.removesuffix('_s'):<10} {share:6.1%}")
    print(f"{'rest':<10} {rest:6.1%}   of {total / len(perf):.2f} s a step over {len(perf)} steps")
    print(f"{machine()}; at most {LIMIT:.0%}: {'met' if rest <= LIMIT else 'MISSED'}")
    print(save("step_breakdown", limit=LIMIT, steps=len(perf), step_s=total / len(perf), shares=shares, rest=rest))
    return 0 if rest <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

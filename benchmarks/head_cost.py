"""Claim: the epistemic head costs at most 10 % of a step, with 20 members and 10 candidates.

Runs the demo with ``--explore`` (steady state: the first steps are left out) and adds up what the run itself measured.
The head's own work is choosing and learning; the features that it reads are a forward pass of the reward model over
all candidates, which is told apart.

    python benchmarks/head_cost.py [--steps 12] [--rule sea-bai]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import machine, save

LIMIT = 0.10
WARM_UP = 2
PER_STEP = 64
MEMBERS, CANDIDATES = 20, 10
STAGES = ("generate_s", "encode_s", "head_s", "score_s", "learn_s", "sync_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rule", default="sea-bai")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("oatlite")), "train", "--preset", "demo", "--gpus", "0"]
        command += ["--ui", "plain", "--run-dir", folder, "--name", "run", "--eval-prompts", "0"]
        command += ["--prompts-per-step", str(PER_STEP), "--max-prompts", str(PER_STEP * (arguments.steps + WARM_UP))]
        command += ["--explore", arguments.rule, "--num-candidates", str(CANDIDATES)]
        subprocess.run([*command, "--set", f"explore.members={MEMBERS}"], check=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    perf = [record["perf"] for record in map(json.loads, lines) if record["kind"] == "step"][WARM_UP:]
    total = sum(p["step_s"] for p in perf)
    shares = {stage: sum(p[stage] for p in perf) / total for stage in STAGES}
    for stage, share in shares.items():
        print(f"{stage.removesuffix('_s'):<10} {share:6.1%}")
    print(f"of {total / len(perf):.2f} s a step over {len(perf)} steps, {PER_STEP} prompts x {CANDIDATES} candidates")
    head = shares["head_s"]
    print(f"{machine()}; at most {LIMIT:.0%}: {'met' if head <= LIMIT else 'MISSED'}")
    print(save("head_cost", limit=LIMIT, steps=len(perf), step_s=total / len(perf), shares=shares))
    return 0 if head <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

"""What exploration is worth on the demo: win rate against oracle queries, for each way of choosing what to ask.

Every method trains by SimPO (xpo by its own loss) on the demo's prompts with the same budget of queries, and is judged
on the same held-out prompts by the same reward model that it learns from. A run that is done is kept in --folder and
not repeated, so the benchmark goes on where it stopped. At the end: a table of queries to a win rate of 0.8 (between
two evaluations, by a straight line), the last win rate with its 95 % interval over seeds, and the time of a run; the
curves as a table and as a picture.

    python benchmarks/exploration.py [--methods passive,sea-bai] [--seeds 3] [--queries 1024] [--folder exploration]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import machine, save

from oatlite.plots import Curve, draw, write_table

GOAL = 0.8
QUERIES = 1024
EVAL_EVERY = 128
METHODS: dict[str, list[str]] = {
    "passive": [],
    "sea-bai": ["--explore", "sea-bai"],
    "sea-bai-logits": ["--explore", "sea-bai", "--set", "explore.uncertainty=logits"],
    "sea-ee": ["--explore", "sea-ee"],
    "uncertainty": ["--explore", "uncertainty"],
    "uncertainty-logits": ["--explore", "uncertainty", "--set", "explore.uncertainty=logits"],
    "mixed": ["--explore", "sea-bai", "--set", "explore.self_label_ratio=0.3"],
    "ee4llm": ["--explore", "sea-ee", "--set", "explore.head_only=true", "--best-of-n", "10"],
    # A half of its prompts is asked about: as many queries a step, and as many gradient steps, as with the others.
    "apl": ["--explore", "apl", "--prompts-per-step", "128", "--batch-size", "64"],
    # Half as many queries a step, and so twice as many gradient steps within the budget.
    "apl-32": ["--explore", "apl"],
    "xpo": ["--algo", "xpo", "--beta", "0.1"],
    "dpo": ["--algo", "dpo", "--beta", "0.1"],
    "dpo-hybrid": ["--algo", "dpo", "--beta", "0.1", "--sampler", "hybrid"],
    "reference": ["--sampler", "reference"],
    "hybrid": ["--sampler", "hybrid"],
    "mixture": ["--sampler", "mixture"],
}


PANELS = {
    "which pair is asked about": (
        *("passive", "sea-bai", "sea-bai-logits", "sea-ee", "uncertainty", "uncertainty-logits", "mixed", "ee4llm"),
        *("apl", "apl-32"),
    ),
    "whom a pair is sampled from": ("passive", "reference", "hybrid", "mixture", "dpo", "dpo-hybrid", "xpo"),
}


def run(method: str, seed: int, queries: int, folder: Path) -> dict[str, Any]:
    """The evaluations of one run, from its folder if it is there already."""
    kept = folder / f"{method}-{seed}-{queries}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    name = f"{method}-{seed}-{time.time_ns()}"
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--preset", "demo", "--ui", "plain", "--gpus", "0"]
    command += ["--run-dir", str(folder / "runs"), "--name", name, "--seed", str(seed)]
    command += ["--max-queries", str(queries), "--epochs", "4", "--eval-every-queries", str(EVAL_EVERY)]
    started = time.monotonic()
    done = subprocess.run([*command, *METHODS[method]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    result = {
        "queries": [record["queries"] for record in records],
        "win_rate": [record["win_rate"] for record in records],
        "gold_score": [record["gold_score"] for record in records],
        "seconds": time.monotonic() - started,
    }
    kept.write_text(json.dumps(result))
    return result


def queries_to(goal: float, result: dict[str, Any]) -> float | None:
    """Where the win rate first reaches ``goal``; None where it never does."""
    queries, rates = result["queries"], result["win_rate"]
    for i in range(1, len(rates)):
        if rates[i] >= goal:
            share = (goal - rates[i - 1]) / (rates[i] - rates[i - 1]) if rates[i - 1] < goal else 0.0
            return float(queries[i - 1] + share * (queries[i] - queries[i - 1]))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--folder", type=Path, default=Path("exploration"))
    given = parser.parse_args()
    unknown = [name for name in given.methods.split(",") if name not in METHODS]
    if unknown:
        parser.error(f"there is no method {unknown[0]} ({', '.join(METHODS)})")
    given.folder.mkdir(parents=True, exist_ok=True)
    grid = np.arange(0, given.queries + 1, EVAL_EVERY, dtype=np.float64)
    curves: dict[str, Curve] = {}
    rows: list[dict[str, Any]] = []
    print("method".ljust(12), *(word.rjust(18) for word in (f"queries to {GOAL}", "win rate", "true score", "s/run")))
    for method in given.methods.split(","):
        results = [run(method, seed, given.queries, given.folder) for seed in range(given.seeds)]
        rates = np.stack([np.interp(grid, r["queries"], r["win_rate"]) for r in results])
        curves[method] = Curve.of_runs(grid, rates)
        reached = [queries_to(GOAL, result) for result in results]
        row = {
            "method": method,
            "queries_to_goal": reached,
            "win_rate": [result["win_rate"][-1] for result in results],
            "gold_score": [result["gold_score"][-1] for result in results],
            "seconds": [result["seconds"] for result in results],
            "runs": results,
        }
        rows.append(row)
        found = [queries for queries in reached if queries is not None]
        to_goal = f"{np.mean(found):.0f}" if len(found) == len(reached) else f"{len(found)} of {len(reached)} runs"
        last = curves[method]
        cells = [
            to_goal,
            f"{last.middle[-1]:.3f} ± {last.high[-1] - last.middle[-1]:.3f}",
            f"{np.mean(row['gold_score']):.3f}",
            f"{np.mean(row['seconds']):.0f}",
        ]
        print(method.ljust(12), *(cell.rjust(18) for cell in cells), flush=True)
    write_table(given.folder / "exploration.csv", curves, "queries")
    panels = {title: {name: curves[name] for name in names if name in curves} for title, names in PANELS.items()}
    labels = {"x_name": "oracle queries", "y_name": "win rate on held-out prompts"}
    pictures = draw(given.folder / "exploration", panels, **labels, y_limits=(0.0, 1.0))
    print(machine(), *pictures, sep="\n")
    name = "exploration" if given.queries == QUERIES else f"exploration-{given.queries}-queries"
    print(save(name, goal=GOAL, queries=given.queries, seeds=given.seeds, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

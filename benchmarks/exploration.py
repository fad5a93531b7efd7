"""What exploration is worth on the demo: win rate against oracle queries, for each way of choosing what to ask.

Every method trains by SimPO (xpo by its own loss) on the demo's prompts with the same budget of queries, and is judged
on the same held-out prompts by the same reward model that it learns from. All seeds start from the demo's one policy,
and differ in what is drawn from there on. A run that is done is kept in --folder and not repeated by the same command,
so the benchmark goes on where it stopped, on another machine if need be: each result says on which it was made. A run
takes half a minute to three minutes on two cores. At the end: a table of queries to a win rate of 0.8 (between two
evaluations, by a straight line), the last win rate with its 95 % interval over seeds, and the time of a run; the curves
as a table and as a picture.

    python benchmarks/exploration.py [--methods passive,sea-bai] [--seeds 3] [--queries 1024] [--folder exploration]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
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
    "ee4llm-passive": ["--explore", "passive", "--set", "explore.head_only=true", "--best-of-n", "10"],
    # A half of its prompts is asked about: as many queries a step, and as many gradient steps, as with the others.
    "apl": ["--explore", "apl", "--prompts-per-step", "128", "--batch-size", "64"],
    # Half as many queries a step, and so twice as many gradient steps within the budget.
    "apl-32": ["--explore", "apl"],
    "xpo": ["--algo", "xpo", "--beta", "0.1"],
    # oat's weight of the optimism is 5e-6: here it is large enough to matter.
    "xpo-0.001": ["--algo", "xpo", "--beta", "0.1", "--set", "algorithm.alpha=0.001"],
    "xpo-0.01": ["--algo", "xpo", "--beta", "0.1", "--set", "algorithm.alpha=0.01"],
    "dpo": ["--algo", "dpo", "--beta", "0.1"],
    "dpo-hybrid": ["--algo", "dpo", "--beta", "0.1", "--sampler", "hybrid"],
    "reference": ["--sampler", "reference"],
    "hybrid": ["--sampler", "hybrid"],
    "mixture": ["--sampler", "mixture"],
}
NAME_WIDTH = max(map(len, METHODS)) + 1
PANELS = {
    "which pair is asked about": (
        *("passive", "sea-bai", "sea-bai-logits", "sea-ee", "uncertainty", "uncertainty-logits", "mixed", "ee4llm"),
        *("ee4llm-passive", "apl", "apl-32"),
    ),
    "whom a pair is sampled from": (
        *("passive", "reference", "hybrid", "mixture", "dpo", "dpo-hybrid", "xpo", "xpo-0.001", "xpo-0.01"),
    ),
}


Train = Callable[[list[str], Path], None]
"""``train(flags, run_folder)``: ``oatlite train`` with these flags, into this folder."""


def flags_of(method: str, seed: int, queries: int) -> list[str]:
    """Everything that a run's numbers depend on."""
    flags = ["--preset", "demo", "--gpus", "0", "--seed", str(seed), "--max-queries", str(queries), "--epochs", "4"]
    return [*flags, "--eval-every-queries", str(EVAL_EVERY), *METHODS[method]]


def train(flags: list[str], run_folder: Path) -> None:
    command = [sys.executable, "-m", "oatlite_cli.main", "train", *flags, "--ui", "plain"]
    command += ["--run-dir", str(run_folder.parent), "--name", run_folder.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run_folder.name}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def run(method: str, seed: int, queries: int, folder: Path, train: Train = train) -> dict[str, Any]:
    """The evaluations of one run, from its folder if the same command has made them already."""
    flags = flags_of(method, seed, queries)
    digest = hashlib.blake2b("\0".join(flags).encode(), digest_size=6).hexdigest()
    kept = folder / f"{method}-{seed}-{queries}-{digest}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    run_folder = folder / "runs" / f"{method}-{seed}-{time.time_ns()}"
    started = time.monotonic()
    train(flags, run_folder)
    records = evaluations(run_folder)
    result = {
        "queries": [record["queries"] for record in records],
        "win_rate": [record["win_rate"] for record in records],
        "gold_score": [record["gold_score"] for record in records],
        "seconds": time.monotonic() - started,
        "machine": machine(),
    }
    kept.write_text(json.dumps(result))
    return result


def evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The records of a run's evaluations, in order."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "eval"]


def queries_to(goal: float, result: dict[str, Any]) -> float | None:
    """Where the win rate first reaches ``goal``; None where it never does."""
    queries, rates = result["queries"], result["win_rate"]
    for i in range(1, len(rates)):
        if rates[i] >= goal:
            share = (goal - rates[i - 1]) / (rates[i] - rates[i - 1]) if rates[i - 1] < goal else 0.0
            return float(queries[i - 1] + share * (queries[i] - queries[i - 1]))
    return None


def main(arguments: list[str] | None = None, train: Train = train) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--folder", type=Path, default=Path("exploration"))
    given = parser.parse_args(arguments)
    unknown = [name for name in given.methods.split(",") if name not in METHODS]
    if unknown:
        parser.error(f"there is no method {unknown[0]} ({', '.join(METHODS)})")
    given.folder.mkdir(parents=True, exist_ok=True)
    grid = np.arange(0, given.queries + 1, EVAL_EVERY, dtype=np.float64)
    curves: dict[str, Curve] = {}
    rows: list[dict[str, Any]] = []
    print(
        "method".ljust(NAME_WIDTH),
        *(word.rjust(18) for word in (f"queries to {GOAL}", "win rate", "true score", "s/run")),
    )
    for method in given.methods.split(","):
        results = [run(method, seed, given.queries, given.folder, train) for seed in range(given.seeds)]
        rates = np.stack([np.interp(grid, r["queries"], r["win_rate"]) for r in results])
        curves[method] = Curve.of_runs(grid, rates)
        reached = [queries_to(GOAL, result) for result in results]
        row = {
            "method": method,
            "queries_to_goal": reached,
            "win_rate": [result["win_rate"][-1] for result in results],
            "gold_score": [result["gold_score"][-1] for result in results],
            "seconds": [result["seconds"] for result in results],
            "machines": sorted({result["machine"] for result in results}),
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
        print(method.ljust(NAME_WIDTH), *(cell.rjust(18) for cell in cells), flush=True)
    write_table(given.folder / "exploration.csv", curves, "queries")
    panels = {title: {name: curves[name] for name in names if name in curves} for title, names in PANELS.items()}
    labels = {"x_name": "oracle queries", "y_name": "win rate on held-out prompts"}
    pictures = draw(given.folder / "exploration", panels, **labels, y_limits=(0.0, 1.0))
    for name in sorted({name for row in rows for name in row["machines"]}):
        print(f"{name}: {', '.join(row['method'] for row in rows if name in row['machines'])}")
    print(*pictures, sep="\n")
    name = "exploration" if given.queries == QUERIES else f"exploration-{given.queries}-queries"
    print(save(name, goal=GOAL, queries=given.queries, seeds=given.seeds, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

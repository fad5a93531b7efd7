"""Claim: on the demo, online SimPO wins at least 25 points of win rate more than it began with, and ends above the
offline baseline, at every seed.

Runs the README's first command (by its seeds), the offline baseline beside it, and, with ``--hacking``, the run whose
reward goes up while the true score goes down. Prints win rate and true score before and after, on the demo's held-out
prompts. A run takes one to two minutes on two cores.

    python benchmarks/demo.py [--seeds 3] [--hacking]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from exploration import evaluations, train
from report import machine, save

RISE = 0.25
WAYS: dict[str, list[str]] = {"online": [], "offline baseline": ["--sync-every", "100000"]}
HACKING = ["--lr", "3e-4", "--max-prompts", "2048", "--set", "learner.schedule=constant"]


def measure(way: str, seed: int, flags: list[str], folder: Path) -> dict[str, Any]:
    run_folder = folder / f"{way.replace(' ', '-')}-{seed}"
    started = time.monotonic()
    train(["--preset", "demo", "--gpus", "0", "--seed", str(seed), *flags], run_folder)
    seconds = time.monotonic() - started
    first, *_, last = evaluations(run_folder)
    row = {
        "way": way,
        "seed": seed,
        "win_rate": [first["win_rate"], last["win_rate"]],
        "gold_score": [first["gold_score"], last["gold_score"]],
        "seconds": seconds,
    }
    cells = [f"{before:.3f} to {after:.3f}" for before, after in (row["win_rate"], row["gold_score"])]
    print(way.ljust(20), str(seed).rjust(4), *(cell.rjust(18) for cell in cells), f"{seconds:.0f}".rjust(6), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hacking", action="store_true")
    given = parser.parse_args()
    print("way".ljust(20), "seed", *(word.rjust(18) for word in ("win rate", "true score")), "s".rjust(6))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [measure(way, seed, WAYS[way], folder) for seed in range(given.seeds) for way in WAYS]
        if given.hacking:
            rows.append(measure("hacking", 0, HACKING, folder))
    ends = {(row["way"], row["seed"]): row["win_rate"] for row in rows}
    holds = all(
        ends["online", seed][1] - ends["online", seed][0] >= RISE
        and ends["online", seed][1] > ends["offline baseline", seed][1]
        for seed in range(given.seeds)
    )
    print(machine())
    print(f"claim {'holds' if holds else 'DOES NOT HOLD'}")
    print(save("demo", rise=RISE, holds=holds, rows=rows))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

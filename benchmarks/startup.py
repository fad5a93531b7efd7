"""Claim: `oatlite --help` answers in under half a second.

Prints the median wall time of fresh processes beside that of a bare interpreter, and the machine.

    python benchmarks/startup.py [--runs 21]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

LIMIT_S = 0.5
RESULTS = Path(__file__).parent / "results"
RUN = "from oatlite_cli.main import run; run()"
LOAD = "from oatlite.config.load import load_config; load_config(preset='demo', num_gpus=0)"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import oatlite": [sys.executable, "-c", "import oatlite"],
    "load a configuration": [sys.executable, "-c", LOAD],
    "oatlite --help": [sys.executable, "-c", RUN, "--help"],
    "oatlite train --help": [sys.executable, "-c", RUN, "train", "--help"],
    "oatlite train --dry-run": [sys.executable, "-c", RUN, "train", "--dry-run", "--preset", "demo"],
}


def median_s(command: list[str], num_runs: int) -> float:
    times = []
    for _ in range(num_runs + 1):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms the file cache


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    num_runs = parser.parse_args().runs
    medians = {name: median_s(command, num_runs) for name, command in COMMANDS.items()}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    bare, shown = medians["python -c pass"], medians["oatlite --help"]
    for name, seconds in medians.items():
        print(f"{name:<26} {seconds:6.3f} s  {seconds / bare:5.1f} x a bare interpreter")
    print(f"{machine}; limit for --help {LIMIT_S} s: {'met' if shown < LIMIT_S else 'MISSED'}")
    RESULTS.mkdir(exist_ok=True)
    result = {"date": date.today().isoformat(), "machine": machine, "runs": num_runs, "median_s": medians}
    (RESULTS / f"startup-{result['date']}.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if shown < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())

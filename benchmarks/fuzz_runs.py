"""Spoiled configurations that pass everything that checks them, run for a few steps, each as a process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz_preflight import small_demo
from fuzz_settings import outcome, spoiled_settings

from oatlite.config.dump import dump_toml
from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config
from oatlite.demo.settings import with_demo
from oatlite.errors import BY_EXIT_CODE

NUM_STEPS = 2
LONGEST_S = 600.0
MOST_PROCESSES = 3
RAN = "ran"
ENDED = "ended with a line"


def fuzz_runs(generator: random.Random, num_runs: int) -> Counter[str]:
    """How ``num_runs`` valid ones ended on this machine's CPU: :data:`RAN`, :data:`ENDED`, or what is wrong."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, small_demo(Path(name)) as paths:
        folder = Path(name)
        while found.total() < num_runs:
            given = spoiled_settings(generator, folder, paths) | {"num_gpus": 0}
            if outcome(given, folder) != "valid":
                continue
            config = with_demo(resolve(load_config(**given), 0))
            if int(config.placement.actors or 0) + int(config.placement.learners or 0) > MOST_PROCESSES:
                continue
            started = time.monotonic()
            how = run(config, folder, f"run-{found.total()}")
            print(
                f"{config.algorithm.name}, {config.explore.rule}: {how}, {time.monotonic() - started:.0f} s", flush=True
            )
            found[how] += 1
    return found


def run(config: Config, folder: Path, name: str) -> str:
    file = folder / "valid.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    sets = {
        "run.dir": folder / "runs",
        "run.name": name,
        "data.epochs": 1,
        "data.max_prompts": NUM_STEPS * config.rollout.prompts_per_step,
        "eval.prompts": min(config.eval.prompts, 8),
    }
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--config", str(file), "--ui", "plain"]
    command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    try:
        ended = subprocess.run(
            command,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{name} does not end"
    lines = ended.stdout.strip().splitlines() or [""]
    if ended.returncode == 0 and (folder / "runs" / name / "model" / "config.json").is_file():
        return RAN
    if (
        ended.returncode in BY_EXIT_CODE
        and lines[-1].startswith("oatlite: error: ")
        and "Traceback" not in ended.stdout
    ):
        print(lines[-1])
        return ENDED
    return f"{name} ended with code {ended.returncode}: {lines[-1]}"

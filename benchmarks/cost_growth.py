"""How the cost of a step grows: seconds against prompt length, response length, prompts a step, and model size.

No claim, but one table: a base case of one actor and one learner, and cases that differ from it in one thing each.
Models and prompts are random, DPO keeps a reference, and the reward model has 5M parameters. The growth stands beside
each time, as a multiple of the base case.

    python benchmarks/cost_growth.py [--steps 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from report import machine, save
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from versus_trl import REWARD_MODEL, STAGES, Shape, make_model, run

WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Lengths in tokens; ``prompts`` are those of one step, with two responses to each."""

    model: str = "5M-float32"
    prompt: int = 100
    response: int = 32
    prompts: int = 32


BASE = Case()
CASES = [
    BASE,
    *(replace(BASE, prompt=length) for length in (200, 400)),
    *(replace(BASE, response=length) for length in (64, 128)),
    *(replace(BASE, prompts=count) for count in (16, 64)),
    replace(BASE, model="20M-float32"),
]


def measure(case: Case, num_steps: int) -> dict[str, float]:
    """Mean seconds of a step and of its stages."""
    vocabulary = Shape.of(case.model).vocabulary
    num_prompts = case.prompts * (WARM_UP + num_steps)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(case.model, AutoModelForCausalLM, vocabulary, folder / "policy")
        make_model(REWARD_MODEL, AutoModelForSequenceClassification, vocabulary, folder / "reward-model", num_labels=1)
        with (folder / "prompts.jsonl").open("w") as file:
            for _ in range(num_prompts):
                words = " ".join(f"w{i}" for i in rng.integers(3, vocabulary, case.prompt))
                file.write(json.dumps({"prompt": words}) + "\n")
        options: dict[str, Any] = {
            "model.path": folder / "policy",
            "data.prompts": folder / "prompts.jsonl",
            "sampling.max_new_tokens": case.response,
            "sampling.temperature": 1.0,
            "rollout.prompts_per_step": case.prompts,
            "learner.micro_batch_size": 8,
            "oracle.path": folder / "reward-model",
            "placement.gpus": 0,
            "eval.prompts": 0,
        }
        command = [sys.executable, "-m", "oatlite_cli.main", "train", "--algo", "dpo", "--ui", "plain"]
        command += ["--run-dir", str(folder), "--name", "run"]
        run(command + [word for key, value in options.items() for word in ("--set", f"{key}={value}")])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    perfs = [record["perf"] for record in map(json.loads, lines) if record["kind"] == "step"][WARM_UP:]
    seconds = {stage: statistics.mean(perf[f"{stage}_s"] for perf in perfs) for stage in STAGES if stage != "rest"}
    seconds["learn"] -= seconds["reference"]  # which is part of it
    seconds["step"] = statistics.mean(perf["step_s"] for perf in perfs)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    num_steps = parser.parse_args().steps
    shown = [stage for stage in STAGES if stage != "rest"]
    headings = ("prompt", "response", "prompts", *shown, "s/step", "growth")
    print("model".ljust(12), *(heading.rjust(9) for heading in headings))
    rows: list[dict[str, Any]] = []
    for case in CASES:
        seconds = measure(case, num_steps)
        growth = seconds["step"] / rows[0]["seconds"]["step"] if rows else 1.0
        rows.append(
            {
                "model": case.model,
                "prompt_tokens": case.prompt,
                "response_tokens": case.response,
                "prompts": case.prompts,
                "seconds": seconds,
                "growth": growth,
            }
        )
        cells = [str(case.prompt), str(case.response), str(case.prompts)]
        cells += [f"{seconds[stage]:.2f}" for stage in (*shown, "step")] + [f"{growth:.2f}x"]
        print(case.model.ljust(12), *(cell.rjust(9) for cell in cells), flush=True)
    print(machine())
    print(save("cost_growth", steps=num_steps, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

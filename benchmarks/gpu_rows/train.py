"""``oatlite train`` itself, with vLLM and DeepSpeed: seconds of each stage, in turns and ahead."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_rows.scale import Scale, Tell
from gpu_rows.step import Folders, random_prompts, save_networks

NUM_STEPS, WARM_UP = 6, 2
MOST_SYNC_S = 0.1
STAGES = ("generate_s", "score_s", "learn_s", "pause_s", "sync_s", "reload_s", "step_s")


def train(scale: Scale, tell: Tell) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as name:
        folder = Path(name)
        folders = save_networks(scale, folder)
        prompts = random_prompts(scale, NUM_STEPS * scale.num_prompts)
        lines = (json.dumps({"prompt": text, "reference": "w2"}) + "\n" for text in prompts.texts)
        (folder / "prompts.jsonl").write_text("".join(lines))
        in_turns = _run(scale, tell, folder, folders, "in turns")
        if in_turns is None:
            return
        ahead = _run(scale, tell, folder, folders, "ahead", "--async")
        if ahead is not None:
            tell("ahead against in turns", f"{in_turns / ahead:.2f}x as many steps", speedup=in_turns / ahead)


def _run(scale: Scale, tell: Tell, folder: Path, folders: Folders, name: str, *more: str) -> float | None:
    """Seconds of a step; None, and said why, where the run is refused."""
    per_step, run = str(scale.num_prompts), name.replace(" ", "-")
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--algo", "simpo", "--ui", "plain", *more]
    command += ["--model", str(folders.policy), "--oracle", str(folders.reward), "--name", run]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--run-dir", str(folder), "--eval-prompts", "0"]
    command += ["--prompts-per-step", per_step, "--micro-batch-size", str(scale.micro_batch_size)]
    command += ["--max-new-tokens", str(scale.new_tokens), "--save-every", "1000"]
    command += [] if scale.on_gpu else ["--gpus", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    for log in sorted((folder / run).glob("logs/*.log")) if done.returncode else ():
        sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}\n")
    if done.returncode == 2 and more:
        tell(name, f"refused: {_last_line(done.stderr or done.stdout)}")
        return None
    if done.returncode:
        raise RuntimeError(f"oatlite train ended with {done.returncode}: {_last_line(done.stderr or done.stdout)}")
    records = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if record["kind"] == "step"][WARM_UP:]
    times = {
        stage: statistics.median(step["perf"][stage] for step in steps) for stage in STAGES if stage in steps[0]["perf"]
    }
    said = ", ".join(f"{stage.removesuffix('_s')} {value:.3f}" for stage, value in times.items())
    is_met = None if scale.tiny or more else times["sync_s"] <= MOST_SYNC_S
    tell(name, f"{said} s", is_met=is_met, seconds=times)
    apart = {key: steps[-1][key] for key in ("mismatch_mean", "mismatch_max", "drift", "staleness") if key in steps[-1]}
    tell(f"{name}, last step", ", ".join(f"{key} {value:.2g}" for key, value in apart.items()), **apart)
    return times["step_s"]


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was said")

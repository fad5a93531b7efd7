"""Every shipped preset trains: with all that it says but its models, its data and its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import OATLITE, Inputs, leftovers, read_lines, run_to_end

from oatlite.config.load import load_config, preset_names

pytestmark = pytest.mark.slow

PRESETS = [name for name in preset_names() if name != "demo"]
SMALL = (
    *(
        "--gpus",
        "0",
        "--learners",
        "1",
        "--actors",
        "1",
        "--ui",
        "plain",
        "--max-prompts",
        "32",
        "--epochs",
        "1",
        "--prompts-per-step",
        "16",
    ),
    *("--batch-size", "8", "--micro-batch-size", "4", "--max-new-tokens", "12", "--prompt-key", "prompt"),
    *("--max-queries", "32", "--eval-prompts", "0", "--set", "data.max_prompt_tokens=200", "--split", "train"),
    *("--set", "model.dtype=float32", "--set", "oracle.dtype=float32"),
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name: str, llama: Inputs, tmp_path: Path) -> None:
    config = load_config(preset=name, num_gpus=8)
    arguments = [str(OATLITE), "train", "--preset", name, *SMALL, "--run-dir", str(tmp_path), "--name", "run"]
    arguments += ["--model", str(llama.policy), "--oracle", str(llama.reward_model), "--prompts", str(llama.prompts)]
    if config.explore.encoder is not None:
        arguments += ["--set", f"explore.encoder={llama.reward_model}"]
    run = run_to_end(arguments, tmp_path / "run")
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert steps and steps[-1]["queries"] > 0
    if not config.explore.head_only:
        assert sum(record["trained_pairs"] for record in steps) > 0
        assert all(record["loss"] is not None for record in steps if record["trained_pairs"])
    samplers = {sampler for row in read_lines(run.folder / "samples.jsonl") for sampler in row["samplers"]}
    both = {"policy", "reference"}
    expected = {
        "policy": both if config.algorithm.name == "xpo" else {"policy"},
        "reference": {"reference"},
        "hybrid": both,
        "mixture": {"mixture-plus", "mixture-minus"},
    }
    assert samplers == expected[config.rollout.sampler]
    assert not leftovers(run.folder)

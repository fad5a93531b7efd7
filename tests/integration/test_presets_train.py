"""Every shipped preset trains: with all that it says but its models, its data and its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import OATLITE, Inputs, leftovers, read_lines, run_to_end

from oatlite.config.load import load_config, preset_names

TRAIN_WHAT_NO_OTHER_TEST_DOES = ("tldr", "tldr-ee4llm", "tldr-xpo", "ref", "mixp")
PRESETS = [
    pytest.param(name, marks=() if name in TRAIN_WHAT_NO_OTHER_TEST_DOES else pytest.mark.long)
    for name in preset_names()
    if name != "demo"
]
SMALL = (
    *("--gpus", "0", "--learners", "1", "--actors", "1", "--ui", "plain", "--eval-prompts", "0"),
    *("--max-prompts", "32", "--epochs", "1", "--prompts-per-step", "16", "--max-queries", "32"),
    *("--batch-size", "8", "--micro-batch-size", "4", "--max-new-tokens", "12"),
    *("--prompt-key", "prompt", "--split", "train", "--set", "data.max_prompt_tokens=200"),
    *("--set", "model.dtype=float32", "--set", "oracle.dtype=float32"),
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name: str, demo: Inputs, tmp_path: Path) -> None:
    config = load_config(preset=name, num_gpus=8)
    arguments = [str(OATLITE), "train", "--preset", name, *SMALL, "--run-dir", str(tmp_path), "--name", "run"]
    arguments += ["--model", str(demo.policy), "--oracle", str(demo.reward_model), "--prompts", str(demo.prompts)]
    if config.explore.encoder is not None:
        arguments += ["--set", f"explore.encoder={demo.reward_model}"]
    run = run_to_end(arguments, tmp_path / "run")
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert steps and steps[-1]["queries"] > 0
    if not config.explore.head_only:
        assert sum(record["trained_pairs"] for record in steps) > 0
        assert all(record["loss"] is not None for record in steps if record["trained_pairs"])
    rows = read_lines(run.folder / "samples.jsonl")
    both = {"policy", "reference"}
    expected = {
        "policy": both if config.algorithm.name == "xpo" else {"policy"},
        "reference": {"reference"},
        "hybrid": both,
        "mixture": {"mixture-plus", "mixture-minus"},
    }[config.rollout.sampler]
    alone = [row for row in rows if config.rollout.policy_share and set(row["samplers"]) == {"policy"}]
    assert bool(alone) == bool(config.rollout.policy_share)
    if alone:
        assert sum(record["policy_share"] for record in steps) * 16 == pytest.approx(len(alone))
    others = [row for row in rows if row not in alone]
    assert all(set(row["samplers"]) == expected for row in others)
    assert {row["samplers"][0] for row in others} == expected, "one side wins always"
    compared = [record["mismatch_mean"] for record in steps if "mismatch_mean" in record]
    assert bool(compared) == (("policy" in expected or bool(alone)) and not config.explore.head_only)
    assert all(mismatch < 1e-3 for mismatch in compared)
    assert not leftovers(run.folder)

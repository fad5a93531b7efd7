"""``oatlite train`` with an adapter, sent merged and alone: the sampler has the learner's policy, and it learns."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from runs import Inputs, Run, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

DPO = ("--algo", "dpo", "--beta", "0.5", "--lr", "0.02", "--max-prompts", "64", "--lora-rank", "4")


@pytest.fixture(scope="module")
def merged(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(llama, tmp_path_factory.mktemp("lora") / "merged", *DPO)


@pytest.fixture(scope="module")
def alone(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(llama, tmp_path_factory.mktemp("lora") / "alone", *DPO, "--set", "lora.sync=adapter")


@pytest.mark.parametrize("way", ["merged", "alone"])
def test_the_sampler_has_the_policy_that_learns(way: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(way)
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert [record["policy_version"] for record in steps] == [0, 1, 2, 3]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(steps[-1]["kl"]) > 0.01, "the policy did not move away from its base"
    for record in steps:
        assert record["mismatch_mean"] < 1e-3
    first, *_, last = run.records("eval")
    assert abs(last["win_probability"] - first["win_probability"]) > 0.01


def test_both_ways_are_the_same_run_but_for_rounding(merged: Run, alone: Run) -> None:
    one, other = merged.records("step"), alone.records("step")
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in other], rel=0.02)
    assert merged.records("eval")[-1]["reward"] == pytest.approx(alone.records("eval")[-1]["reward"], abs=0.05)


def test_it_leaves_a_whole_model_and_an_adapter_that_are_the_same_policy(alone: Run, llama: Inputs) -> None:
    ids = torch.arange(3, 30).view(1, -1)
    base = AutoModelForCausalLM.from_pretrained(llama.policy).eval()
    whole = AutoModelForCausalLM.from_pretrained(alone.folder / "model").eval()
    with torch.no_grad():
        expected = whole(ids).logits
        assert (expected - base(ids).logits).abs().max() > 0.01
        adapted = PeftModel.from_pretrained(base, str(alone.folder / "adapter")).eval()
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(".lora_" in name for name in load_file(alone.folder / "adapter" / "adapter_model.safetensors"))

"""``oatlite train`` as a process, with vLLM and DeepSpeed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from greedy import DECIDED, decided_tokens
from live import EngineMode, Stopwatch, live, wait_until
from runs import (
    OATLITE,
    Inputs,
    Run,
    command,
    leftovers,
    read_lines,
    run_to_end,
    start,
    start_command,
    train,
    worker_pids,
)
from small_pairrm import save_pairrm
from transformers import AutoModelForCausalLM, AutoTokenizer

from oatlite.config.load import load_config, resolve
from oatlite.errors import ConfigError
from oatlite.run_folder import create_run_dir

EXAMPLE = Path(__file__).parents[1] / "unit" / "example_algorithm.py"


def test_a_run_ends_well_and_leaves_what_it_should(one_by_one: Run) -> None:
    assert one_by_one.exit_code == 0, one_by_one.output
    assert [record["step"] for record in one_by_one.records("step")] == [1, 2, 3]
    assert [record["step"] for record in one_by_one.records("eval")] == [0, 2, 3]
    assert [record["policy_version"] for record in one_by_one.records("step")] == [0, 1, 2]
    assert sorted(path.name for path in one_by_one.folder.iterdir()) == [
        *("checkpoints", "config.toml", "eval", "logs", "metrics.jsonl", "model", "samples.jsonl")
    ]
    assert sorted(path.name for path in (one_by_one.folder / "logs").iterdir()) == ["actor-0.log", "learner-0.log"]
    assert leftovers(one_by_one.folder) == []
    last = one_by_one.output.strip().splitlines()[-2:]
    for line, more in zip(last, ("--seed 1", "--sync-every 100000"), strict=True):
        assert f"oatlite train --config {one_by_one.folder / 'config.toml'} {more}" in line


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    config = resolve(load_config(preset="demo", flags={"run.dir": str(tmp_path)}, num_gpus=0), 0)
    first, second = (create_run_dir(config) for _ in range(2))
    assert second.name == f"{first.name}-2"
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": "mine"})})
    create_run_dir(named)
    with pytest.raises(ConfigError, match="in use"):
        create_run_dir(named)


def test_samples_and_evaluations_are_saved_whole(one_by_one: Run) -> None:
    pairs = read_lines(one_by_one.folder / "samples.jsonl")
    assert len(pairs) == 48
    assert {pair["step"] for pair in pairs} == {1, 2, 3}
    assert all(0.5 <= pair["win_probability"] <= 1 and pair["samplers"] == ["policy", "policy"] for pair in pairs)
    rows = read_lines(one_by_one.folder / "eval" / "step-000003.jsonl")
    assert len(rows) == 8
    wins = [row["win_probability"] for row in rows]
    record = one_by_one.records("eval")[-1]
    assert record["win_probability"] == pytest.approx(sum(wins) / 8)
    assert record["win_rate"] == pytest.approx(sum(win > 0.5 for win in wins) / 8)
    assert record["eval_queries"] == 8
    for kind, whole in (("step", "step_s"), ("eval", "eval_s")):
        assert all(0 < each["perf"]["score_s"] < each["perf"][whole] for each in one_by_one.records(kind))


def test_the_learner_agrees_with_the_sampler_after_every_sync(one_by_one: Run) -> None:
    """Float32 on one machine: what is left is rounding. Stale or torn weights would show at once, at this rate."""
    for record in one_by_one.records("step"):
        assert record["mismatch_mean"] < 1e-4
        assert record["mismatch_outside"] == 0
        assert record["staleness"] == 0


def test_the_engine_answers_with_the_weights_that_are_saved(one_by_one: Run) -> None:
    """The last evaluation is greedy, and of the last policy. Texts end before bytes that are no whole character."""
    saved = one_by_one.folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    first, last = (read_lines(one_by_one.folder / "eval" / f"step-00000{step}.jsonl") for step in (0, 3))
    num_decided = 0
    for row in last:
        decided = decided_tokens(model, np.array(tokenizer(row["prompt"])["input_ids"]), 12)
        text = tokenizer.decode(decided, skip_special_tokens=True).rstrip("\ufffd")
        assert row["response"].startswith(text)
        num_decided += len(text)
    assert num_decided > 40, "too little was decided to say anything"
    assert sum(one["response"] != other["response"] for one, other in zip(first, last, strict=True)) >= 4


def test_training_moves_the_policy_and_the_saved_model_loads(one_by_one: Run, llama: Inputs) -> None:
    before = AutoModelForCausalLM.from_pretrained(llama.policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(one_by_one.folder / "model").state_dict()
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-4 for name in before)
    assert len(AutoTokenizer.from_pretrained(one_by_one.folder / "model")) == len(
        AutoTokenizer.from_pretrained(llama.policy)
    )


def test_the_saved_configuration_repeats_the_run_bit_for_bit(one_by_one: Run, llama: Inputs, tmp_path: Path) -> None:
    config = one_by_one.folder / "config.toml"
    assert tomllib.loads(config.read_text())["model"]["path"] == str(llama.policy)
    again = train_from(config, tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert again.metrics() == one_by_one.metrics()
    assert read_lines(again.folder / "samples.jsonl") == read_lines(one_by_one.folder / "samples.jsonl")


def train_from(config: Path, folder: Path) -> Run:
    arguments = ["train", "--config", str(config), "--run-dir", str(folder.parent), "--name", folder.name]
    return run_to_end([str(OATLITE), *arguments], folder)


TWO_ACTORS = ("--algo", "simpo", "--actors", "2", "--max-queries", "16")


@pytest.fixture(scope="module")
def two_actors(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first step of ``one_by_one`` with two actors, logged to Weights & Biases too."""
    return train(llama, tmp_path_factory.mktemp("runs") / "two-actors", *TWO_ACTORS, "--wandb")


@pytest.mark.fault("18")
def test_after_an_actor_was_killed_in_the_middle_of_an_update_both_answer_with_the_new_version(
    two_actors: Run, llama: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    with live(command(llama, folder, *TWO_ACTORS), folder, engine.environment) as run:
        run.wait_for("learner 0", "evaluate: step 0")  # the initial weights are loaded
        engine.set("halt actor-1")
        run.wait_for("learner 0", "sync: version 1")
        run.wait_until_stopped("actor-1")
        engine.set("fast")
        run.send("actor-1", signal.SIGKILL)
        run.wait_for("actor 1 was killed by SIGKILL; restart 1 of 3")
        assert not (folder / "eval" / "step-000001.jsonl").exists()
        code, _ = run.end()
    assert code == 0, run.output
    assert Run(folder, code, "").metrics() == two_actors.metrics()
    for evaluation in ("step-000000.jsonl", "step-000001.jsonl"):
        assert read_lines(folder / "eval" / evaluation) == read_lines(two_actors.folder / "eval" / evaluation)


def test_weights_and_biases_keeps_a_run_offline(two_actors: Run) -> None:
    assert two_actors.exit_code == 0, two_actors.output
    (kept,) = two_actors.folder.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for name in (b"train/loss", b"eval/win_rate", b"perf/step_s"):
        assert name in content


def test_two_actors_sample_the_same_responses(one_by_one: Run, two_actors: Run) -> None:
    assert two_actors.exit_code == 0, two_actors.output
    one = [pair for pair in read_lines(one_by_one.folder / "samples.jsonl") if pair["step"] == 1]
    two = read_lines(two_actors.folder / "samples.jsonl")
    assert [pair["prompt"] for pair in two] == [pair["prompt"] for pair in one]
    responses = [[pair[side] for pair in pairs for side in ("chosen", "rejected")] for pairs in (one, two)]
    same = [a == b for a, b in zip(*responses, strict=True)]
    assert len(same) == 32 and sum(same) >= 0.99 * len(same)


def test_two_ranks_with_two_actors_learn_what_one_does(one_by_one: Run, two_by_two: Run) -> None:
    """Its budget ends within its third step: of nine prompts one rank gets five, the other four."""
    assert two_by_two.exit_code == 0, two_by_two.output
    steps = two_by_two.records("step")
    assert len(steps) == 3
    pairs = [pair for pair in read_lines(two_by_two.folder / "samples.jsonl") if pair["step"] == 3]
    assert len(pairs) == 41 - steps[1]["queries"] < 16
    asked = sum(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert steps[2]["queries"] == steps[1]["queries"] + asked <= 41
    assert steps[2]["trained_pairs"] == sum(pair["is_trainable"] for pair in pairs) > 0
    for one, two in zip(one_by_one.records("step")[:2], steps[:2], strict=True):
        assert two["queries"] == one["queries"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-2)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert len(read_lines(two_by_two.folder / "eval" / "step-000000.jsonl")) == 8


def test_dpo_on_gpt_neox_offline(neox: Inputs, tmp_path: Path) -> None:
    """The second step's evaluation is of newer weights, and what the third samples is the first policy's again."""
    usable = neox.prompts.read_text().splitlines()[:56]
    left_out = [json.dumps({"prompt": prompt, "reference": " none"}) for prompt in ("", "too long" * 40)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(left_out + usable))
    never_synced = ("--sync-every", "1000", "--set", "sync.bucket_mib=1", "--set", "sampling.top_k=2")
    more = ("--max-prompts", "99", "--eval-prompts", "8", "--max-prompt-tokens", "200")  # all that there are
    run = train(replace(neox, prompts=prompts), tmp_path / "offline", "--algo", "dpo", *never_synced, *more)
    assert run.exit_code == 0, run.output
    assert "2 prompts were empty or too long and are left out" in run.output
    steps = run.records("step")
    assert [record["policy_version"] for record in steps] == [0, 0, 0]
    assert steps[0]["mismatch_mean"] < 1e-4
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(steps[-1]["kl"]) > 1e-4
    evals = run.records("eval")
    assert evals[-1]["win_probability"] != evals[0]["win_probability"]
    pairs = [pair for pair in read_lines(run.folder / "samples.jsonl") if pair["step"] == 3]
    first, last = (are_likeliest(policy, pairs, 2) for policy in (neox.policy, run.folder / "model"))
    assert all(first)
    assert len(first) > 30 and sum(last) < 0.9 * len(last), "too little to tell them apart"


def are_likeliest(policy: Path, pairs: list[dict[str, Any]], count: int) -> list[bool]:
    """Of each of the responses' tokens, whether it is among the ``count`` that ``policy`` finds likeliest there.

    One that rounding may have kept out is. Texts hold some bytes as U+FFFD: a response counts as far as the first.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    found: list[bool] = []
    for pair, side in itertools.product(pairs, ("chosen", "rejected")):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        response = tokenizer(pair[side].partition("\ufffd")[0])["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        least = logits.topk(count).values[:, -1] - DECIDED
        found += (logits[range(len(response)), response] >= least).tolist()
    return found


def test_an_algorithm_of_a_users_own_judged_by_pairrm(llama: Inputs, tmp_path: Path) -> None:
    judged = replace(llama, reward_model=Path(save_pairrm(tmp_path / "pairrm")[0]))
    run = train(judged, tmp_path / "own", "--algo", f"{EXAMPLE}:FarApart", "--set", "algorithm.options.margin=0.5")
    assert run.exit_code == 0, run.output
    last = run.records("step")[-1]
    assert last["queries"] == 48
    assert last["trained_pairs"] > 0
    assert 0 < run.records("eval")[-1]["win_probability"] < 1


@pytest.mark.fault("6", "8")
@pytest.mark.parametrize(("stage", "times", "end_s"), [("starting", 1, 30), ("generate", 2, 4), ("learn: step", 1, 30)])
def test_ctrl_c_leaves_nothing(stage: str, times: int, end_s: float, llama: Inputs, tmp_path: Path) -> None:
    """The second time, it waits for an actor that does not hear."""
    run = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("deaf" if times == 2 else "fast")
    arguments = command(llama, run, "--max-prompts", "72", "--epochs", "200")
    process = start_command(arguments, engine.environment)
    try:
        seen = _wait_for_stage(process, stage)
        process.send_signal(signal.SIGINT)
        if times == 2:
            wait_until(lambda: not worker_pids("learner-0"), end_s)
            assert worker_pids("actor-0") and process.poll() is None, "it waits"
            process.send_signal(signal.SIGINT)
        watch = Stopwatch()
        rest, _ = process.communicate(timeout=30)
        watch.within(end_s, f"Ctrl-C, {times} times, to the end")
    finally:
        process.kill()
    assert process.returncode == 130, seen + rest
    assert leftovers(run) == []
    assert "Traceback" not in seen + rest


def _wait_for_stage(process: subprocess.Popen[str], stage: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if f" {stage}" in line and ("actor" in line if stage == "generate" else "learner" in line):
            return seen
    raise AssertionError(f"no stage {stage} in:\n{seen}")


@pytest.mark.fault("7")
def test_sigterm_ends_with_143(llama: Inputs, tmp_path: Path) -> None:
    process = start(llama, tmp_path / "term", "--epochs", "200")
    try:
        seen = _wait_for_stage(process, "generate")
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)  # a whole step and its checkpoint
    finally:
        process.kill()
    assert process.returncode == 143, seen + rest
    assert leftovers(tmp_path / "term") == []


@pytest.mark.fault("4")
def test_a_killed_learner_ends_the_run_with_its_name(llama: Inputs, tmp_path: Path) -> None:
    process = start(llama, tmp_path / "learner", "--epochs", "200")
    try:
        seen = _wait_for_stage(process, "generate")
        os.kill(worker_pids("learner-0")[0], signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 3, seen + rest
    last = rest.strip().splitlines()[-1]
    assert "learner 0 was killed by SIGKILL" in last
    assert "learner-0.log" in last
    assert leftovers(tmp_path / "learner") == []

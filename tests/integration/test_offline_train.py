"""``oatlite train --offline``: the losses on recorded pairs, as a process, on one rank and on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from oatlite_cli.main import main
from runs import Inputs, Run, leftovers, read_lines, train
from small_folders import save_model
from transformers import AutoModelForCausalLM

OFFLINE = ("--offline", "--algo", "dpo", "--epochs", "2")


@pytest.fixture(scope="module")
def one_rank(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(llama, tmp_path_factory.mktemp("runs") / "offline", *OFFLINE)


def test_it_learns_from_pairs_without_an_actor(one_rank: Run) -> None:
    assert one_rank.exit_code == 0, one_rank.output
    assert sorted(path.name for path in (one_rank.folder / "logs").iterdir()) == ["learner-0.log"]
    assert leftovers(one_rank.folder) == []
    steps, evals = one_rank.records("step"), one_rank.records("eval")
    assert [record["step"] for record in evals] == [0, 2, 4, 6] and len(steps) == 6
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert evals[-1]["loss"] < 0.6 and evals[-1]["accuracy"] > 0.9
    rows = read_lines(one_rank.folder / "eval" / "step-000006.jsonl")
    assert len(rows) == 8 and all(row["rejected"] == " none at all" for row in rows)
    assert "oracle queries" not in one_rank.output and "offline baseline" not in one_rank.output
    assert AutoModelForCausalLM.from_pretrained(one_rank.folder / "model").num_parameters() > 0


def test_two_ranks_learn_the_same(one_rank: Run, llama: Inputs, tmp_path: Path) -> None:
    split = ("--learners", "2", "--set", "learner.zero_stage=2")
    two_ranks = train(llama, tmp_path / "two-ranks", *OFFLINE, *split)
    assert two_ranks.exit_code == 0, two_ranks.output
    for kind in ("step", "eval"):
        for one, two in zip(one_rank.records(kind), two_ranks.records(kind), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.13)


def test_a_mixture_of_experts_keeps_its_routers_even(llama: Inputs, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    policy = save_model(tmp_path / "policy", "moe", seed=1, **sizes)
    inputs = dataclasses.replace(llama, policy=Path(policy))
    weighted = ("--set", "learner.aux_loss_coef=0.1", "--set", "learner.zero_stage=2")
    run = train(inputs, tmp_path / "experts", "--offline", "--algo", "dpo", *weighted)
    assert run.exit_code == 0, run.output
    for record in run.records("step"):
        assert record["balance"] >= 1.9, "two of four experts: two where they are used evenly"
    first = run.records("step")[0]
    assert first["loss"] == pytest.approx(0.6931 + 0.1 * first["balance"], abs=1e-4)


def test_a_loss_of_rewards_needs_them_in_the_data(
    llama: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--offline", "--preferences", str(llama.preferences), "--model", str(llama.policy), "--gpus", "0"]
    assert main(["train", *given, "--algo", "rev_kl", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--set data.margin_key=COLUMN" in error
    assert main(["train", *given, "--run-dir", str(tmp_path), "--set", "data.max_response_tokens=3"]) == 2
    assert "80 are empty, equal or too long" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

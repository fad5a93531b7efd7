"""Training with functions and with several oracles, as processes with vLLM and DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import Inputs, leftovers, read_lines, train

from oatlite.oracles.reward_model import RewardModelOracle

FUNCTIONS = """
def alike(response, reference):
    return len(set(response) & set(reference)) / len(set(reference))

def shorter(prompt, first, second):
    return 0.9 if len(first) < len(second) else 0.1

def breaks(prompt, response):
    breaks.calls += 1
    return len(response) if breaks.calls < 40 else float("nan")
breaks.calls = 0
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return str(tmp_path / "functions.py")


def test_a_function_and_a_reward_model_together_evaluated_by_another(
    llama: Inputs, functions: str, tmp_path: Path
) -> None:
    run = train(
        llama,
        tmp_path / "mixed",
        *("--oracle", f"{functions}:alike", "--oracle-weights", "0.25,2", "--flip-prob", "0.2"),
        *("--eval-oracle", f"{functions}:shorter", "--eval-every-queries", "30", "--best-of-n", "3"),
        *("--set", "eval.online=true"),
    )
    assert run.exit_code == 0, run.output
    assert leftovers(run.folder) == []
    pairs = read_lines(run.folder / "samples.jsonl")
    assert 0 < sum(pair.get("is_flipped", False) for pair in pairs) < len(pairs)
    prompts, numbers = [pair["prompt"] for pair in pairs], [pair["prompt"].split()[-1].rstrip(":") for pair in pairs]
    reward_model, rewards = RewardModelOracle(str(llama.reward_model)), {}
    for side in ("chosen", "rejected"):
        texts = [pair[side] for pair in pairs]
        references = [set(f" it is {number}") for number in numbers]
        alike = [len(set(text) & known) / len(known) for text, known in zip(texts, references, strict=True)]
        rewards[side] = 0.25 * reward_model.score(prompts, texts) + 2 * np.array(alike)
    expected = 1 / (1 + np.exp(rewards["rejected"] - rewards["chosen"]))
    np.testing.assert_allclose([pair["win_probability"] for pair in pairs], expected, atol=1e-5)
    asked = sum(pair["chosen"] != pair["rejected"] for pair in pairs)
    steps, evals = run.records("step"), run.records("eval")
    assert steps[-1]["queries"] == asked
    assert [record["step"] for record in evals] == [0, 2, 3]
    assert all(0 <= record["online_win_rate"] <= 1 for record in steps)
    rows = read_lines(run.folder / "eval" / "step-000003.jsonl")
    for row in rows:
        expected = 0.9 if len(row["response"]) < len(row["reference"]) else 0.1
        assert row["win_probability"] == pytest.approx(expected)
        assert "reward" not in row, "the oracle of evaluation compares, and gives none"


def test_a_function_alone_is_trained_on_until_it_fails_and_ends_the_run_with_its_name(
    llama: Inputs, functions: str, tmp_path: Path
) -> None:
    alone = replace(llama, reward_model=Path(f"{functions}:breaks"))
    run = train(alone, tmp_path / "broken", "--eval-prompts", "0")
    assert run.exit_code == 6, run.output
    last = run.output.strip().splitlines()[-1]
    assert "functions.py:breaks returned 'nan'" in last and "actor-0.log" in last
    # A step whose verdicts never came is not trained on, not in part either.
    trained = [record["step"] for record in run.records("step")]
    pairs = read_lines(run.folder / "samples.jsonl")
    assert {row["step"] for row in pairs} == set(trained) == {1}
    usable = [row for row in pairs if row["is_trainable"]]
    assert run.records("step")[0]["trained_pairs"] == len(usable) > 0
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in usable)
    assert leftovers(run.folder) == []

"""Training with functions and with several oracles, as processes with vLLM and DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from runs import Inputs, leftovers, read_lines, train

FUNCTIONS = """
def alike(response, reference):
    return len(set(response) & set(reference)) / len(set(reference))

def shorter(prompt, first, second):
    return 0.9 if len(first) < len(second) else 0.1

def breaks(prompt, response):
    breaks.calls += 1
    return 1.0 if breaks.calls < 40 else float("nan")
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


def test_a_function_that_fails_in_the_middle_ends_the_run_with_its_name(
    llama: Inputs, functions: str, tmp_path: Path
) -> None:
    alone = replace(llama, reward_model=Path(f"{functions}:breaks"))
    run = train(alone, tmp_path / "broken", "--eval-prompts", "0")
    assert run.exit_code == 6, run.output
    last = run.output.strip().splitlines()[-1]
    assert "functions.py:breaks returned 'nan'" in last and "actor-0.log" in last
    # A step whose verdicts never came is not trained on, not in part either.
    trained = [record["step"] for record in run.records("step")]
    assert {row["step"] for row in read_lines(run.folder / "samples.jsonl")} == set(trained) == {1}
    assert leftovers(run.folder) == []

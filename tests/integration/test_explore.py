"""Exploration by the epistemic head with vLLM and DeepSpeed: pairs chosen among candidates, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from runs import Inputs, Run, demo_command, leftovers, read_lines, run_to_end, train
from safetensors.torch import load_file
from small_pairrm import save_pairrm

from oatlite.demo.task import true_score
from oatlite.epistemic import load_head

SMALL = ("--num-candidates", "4", "--set", "explore.members=5", "--set", "explore.hidden_size=16")


@pytest.fixture(scope="module")
def explored(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On the demo as its preset has it, which names no model and no prompts."""
    folder = tmp_path_factory.mktemp("explored") / "sea"
    own_pairs = ("--set", "explore.self_label_ratio=0.25", "--set", "explore.burn_in=1")
    more = ("--algo", "dpo", "--explore", "sea-bai", *SMALL, *own_pairs, "--best-of-n", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.ENVIRONMENT, "XDG_CACHE_HOME", str(demo_cache))
        return run_to_end(demo_command(folder, *more), folder)


def test_a_run_with_sea_asks_about_chosen_pairs_and_learns_a_head(explored: Run) -> None:
    assert explored.exit_code == 0, explored.output
    assert leftovers(explored.folder) == []
    steps, pairs = explored.records("step"), read_lines(explored.folder / "samples.jsonl")
    own = [pair for pair in pairs if pair.get("is_self_labelled")]
    assert {pair["step"] for pair in own} == {2, 3} and len(own) <= 2 * 4
    asked = [p for p in pairs if not p.get("is_self_labelled") and p["chosen"] != p["rejected"]]
    assert steps[-1]["queries"] == len(asked) <= 16 + 2 * 12
    assert all(record["head/loss"] > 0 and 0 <= record["head/accuracy"] <= 1 for record in steps)
    assert all(0 < record["head/pull"] <= 0.5 for record in steps)
    assert all(record["perf"]["head_s"] < record["perf"]["step_s"] for record in steps)
    assert steps[-1]["trained_pairs"] > 0
    assert [record["step"] for record in explored.records("eval")] == [0, 2, 3]


def test_the_true_score_of_the_demo_is_recorded(explored: Run) -> None:
    assert explored.exit_code == 0, explored.output
    scores = {
        "gold_score": lambda row: true_score(row["prompt"], row["response"]),
        "reference_gold_score": lambda row: true_score(row["prompt"], row["reference"]),
    }
    for record in explored.records("eval"):
        rows = read_lines(explored.folder / "eval" / f"step-{record['step']:06}.jsonl")
        assert len(rows) == 8
        for name, score in scores.items():
            assert [row[name] for row in rows] == [score(row) for row in rows]
            assert record[name] == pytest.approx(sum(map(score, rows)) / 8)
        assert record["reference_gold_score"] > 0
    pairs = read_lines(explored.folder / "samples.jsonl")
    for record in explored.records("step"):
        of_step = [pair for pair in pairs if pair["step"] == record["step"]]
        judged = [[true_score(pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in of_step]
        assert [pair["gold_scores"] for pair in of_step] == judged
        assert record["gold_score"] == pytest.approx(sum(map(sum, judged)) / (2 * len(judged)))


def test_active_preference_learning_asks_about_a_part_of_the_prompts(demo: Inputs, tmp_path: Path) -> None:
    shares = ("--set", "explore.entropy_share=0.75", "--set", "explore.certainty_share=0.5")
    two = ("--learners", "2", "--actors", "2")
    run = train(demo, tmp_path / "apl", "--algo", "simpo", "--explore", "apl", "--num-candidates", "3", *shares, *two)
    assert run.exit_code == 0, run.output
    pairs = read_lines(run.folder / "samples.jsonl")
    assert len(pairs) == 3 * 2 * 3, "of each rank a half of three quarters of 8"
    assert run.records("step")[-1]["queries"] == sum(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert run.records("step")[-1]["trained_pairs"] > 0


@pytest.mark.parametrize("more", [("sea-ee", "policy"), ("uncertainty", "policy"), ("passive", "hybrid")])
def test_the_other_rules(more: tuple[str, str], demo: Inputs, tmp_path: Path) -> None:
    rule, sampler = more
    short = ("--max-prompts", "32", "--eval-prompts", "0")
    small = SMALL[2:] if rule == "passive" else SMALL  # it takes two candidates
    run = train(demo, tmp_path / rule, "--algo", "dpo", "--explore", rule, "--sampler", sampler, *small, *short)
    assert run.exit_code == 0, run.output
    pairs = read_lines(run.folder / "samples.jsonl")
    expected = ["policy", "reference"] if sampler == "hybrid" else ["policy", "policy"]
    assert pairs and all(sorted(pair["samplers"]) == expected for pair in pairs)
    steps = run.records("step")
    assert all(record["head/loss"] > 0 for record in steps) and steps[-1]["trained_pairs"] > 0


def test_two_ranks_hold_the_same_head_and_pairrm_gives_features(demo: Inputs, tmp_path: Path) -> None:
    """The ranks compare digests of their heads at each step, and end a run where these differ."""
    encoder = save_pairrm(tmp_path / "pairrm")[0]
    more = (
        "--set",
        f"explore.encoder={encoder}",
        "--set",
        "explore.head_only=true",
        "--save-every",
        "2",
        "--best-of-n",
        "2",
    )
    run = train(demo, tmp_path / "two", "--explore", "sea-ee", *SMALL, *more, "--learners", "2", "--actors", "2")
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert [record["trained_pairs"] for record in steps] == [0, 0, 0]
    assert [(record["policy_version"], record["staleness"]) for record in steps] == [(0, 0)] * 3
    assert "trains on nothing" not in run.output
    (head,) = (run.folder / "checkpoints").glob("*/head.safetensors")
    saved = load_file(head)
    last = load_head(run.folder / "head")
    assert last.num_members == 5 and last.weights[0].shape[1] == 32
    assert all(torch.equal(w, saved[f"head.weights.{i}"]) for i, w in enumerate(last.weights)), "after the last step"
    assert saved["comparisons"].shape[1:] == (2, 32), "the states at two prefixes, of 16 each"
    assert len(saved["comparisons"]) == sum(pair["is_trainable"] for pair in read_lines(run.folder / "samples.jsonl"))

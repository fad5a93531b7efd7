"""``oatlite train`` with responses that are not the policy's alone, with the real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Inputs, leftovers, read_lines, train

COMMON = ("--max-prompts", "32", "--eval-every", "99", "--eval-prompts", "0", "--lr", "0.01")

RUNS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "reference": (("--algo", "dpo", "--sampler", "reference"), {"reference"}),
    "mixture": (("--algo", "simpo", "--sampler", "mixture"), {"mixture-plus", "mixture-minus"}),
    "xpo": (("--algo", "xpo", "--set", "algorithm.alpha=0.01"), {"policy", "reference"}),
    "mixture, adapter": (
        ("--algo", "dpo", "--sampler", "mixture", "--lora-rank", "4", "--set", "lora.sync=adapter"),
        {"mixture-plus", "mixture-minus"},
    ),
    "hybrid, adapter": (
        ("--algo", "dpo", "--sampler", "hybrid", "--lora-rank", "4", "--set", "lora.sync=adapter"),
        {"policy", "reference"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(name: str, demo: Inputs, tmp_path: Path) -> None:
    flags, samplers = RUNS[name]
    run = train(demo, tmp_path / "run", *COMMON, *flags)
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert [record["policy_version"] for record in steps] == [0, 1]
    rows = read_lines(run.folder / "samples.jsonl")
    assert len(rows) == 32
    assert all(set(row["samplers"]) == samplers for row in rows)
    chosen = {row["samplers"][0] for row in rows}
    assert chosen == samplers, "one side wins always"
    for record in steps:
        if "policy" in samplers:
            assert record["mismatch_mean"] < 1e-3
        else:
            assert "mismatch_mean" not in record
    assert not leftovers(run.folder)

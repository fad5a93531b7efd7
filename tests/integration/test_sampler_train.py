"""``oatlite train`` with an adapter and with responses that are not the policy's alone, with the real engines.

Without an adapter the presets ``ref``, ``gshf`` and ``mixp`` do so (``test_presets_train.py``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Inputs, leftovers, read_lines, train

COMMON = ("--max-prompts", "32", "--eval-every", "99", "--eval-prompts", "0", "--lr", "0.01")

ADAPTER = ("--algo", "dpo", "--lora-rank", "4", "--set", "lora.sync=adapter")
SAMPLERS = {"mixture": {"mixture-plus", "mixture-minus"}, "hybrid": {"policy", "reference"}}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_trains(sampler: str, demo: Inputs, tmp_path: Path) -> None:
    samplers = SAMPLERS[sampler]
    run = train(demo, tmp_path / "run", *COMMON, *ADAPTER, "--sampler", sampler)
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

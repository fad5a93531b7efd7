"""A learner whose main thread hangs while another gives signs of life."""

from __future__ import annotations

from pathlib import Path

import pytest
from live import CLEAN_S, Stopwatch, live
from runs import Inputs, command

STUCK = """
import time
from oatlite.algorithms.simpo import SimPO
from oatlite.algorithms.base import Options
from oatlite.config.algorithms import SimPOConfig

class Stuck(SimPO):
    Options = Options

    def __init__(self, options):
        super().__init__(SimPOConfig())

    def loss(self, policy, reference, batch):
        time.sleep(1e6)
"""
LEARN_S = 20


@pytest.mark.fault("3b")
def test_a_learner_that_hangs_ends_the_run_with_its_stacks(llama: Inputs, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    folder = tmp_path / "run"
    more = ("--algo", f"{tmp_path / 'stuck.py'}:Stuck", "--set", f"timeouts.learn_s={LEARN_S}")
    with live(command(llama, folder, *more), folder) as run:
        run.wait_for("learner 0", "learn: step 1")
        watch = Stopwatch()
        code, last = run.end()
        watch.within(LEARN_S + CLEAN_S, "learner hangs, to the end")
    assert code == 7, run.output
    assert f"learner 0 did nothing but learn: step 1 for {LEARN_S} s" in last
    log = folder / "logs" / "learner-0.log"
    assert str(log) in last and "in loss" in log.read_text() and "oatlite train --config" in last

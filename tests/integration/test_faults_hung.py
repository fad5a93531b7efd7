"""Workers whose main thread hangs while another gives signs of life."""

from __future__ import annotations

from pathlib import Path

import pytest
from live import CLEAN_S, EngineMode, Stopwatch, live
from runs import DEADLINE_S, Inputs, command

STUCK = """
import sys
import time
from oatlite.algorithms.simpo import SimPO
from oatlite.algorithms.base import Options
from oatlite.config.algorithms import SimPOConfig

class Stuck(SimPO):
    Options = Options

    def __init__(self, options):
        super().__init__(SimPOConfig())
        self.hangs("__init__")

    def hangs(self, where):
        if where == "WHERE" and sys.argv[-1].endswith("learner-0.json"):
            time.sleep(1e6)

    def select(self, sets, scores, rng):
        self.hangs("select")
        return super().select(sets, scores, rng)

    def loss(self, policy, reference, batch):
        self.hangs("loss")
        return super().loss(policy, reference, batch)
"""
LEARN_S = 20
START_S = 90  # with two other processes for each core, an engine was loaded in 25 s


@pytest.mark.fault("3b")
@pytest.mark.parametrize(
    ("where", "stage", "bound", "bound_s"),
    [
        pytest.param("__init__", "starting: model", "start_s", START_S, marks=pytest.mark.long),
        pytest.param("select", "idle", "learn_s", LEARN_S, marks=pytest.mark.long),
        ("loss", "learn: step 1", "learn_s", LEARN_S),
    ],
)
def test_a_learner_that_hangs_ends_the_run_with_its_stacks(
    where: str, stage: str, bound: str, bound_s: int, llama: Inputs, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK.replace("WHERE", where))
    folder = tmp_path / "run"
    more = ("--algo", f"{tmp_path / 'stuck.py'}:Stuck", "--set", f"timeouts.{bound}={bound_s}")
    with live(command(llama, folder, *more), folder) as run:
        if where == "select":
            run.wait_for("learner 0", "generate: step 1")
        run.wait_for("learner 0", stage)
        watch = Stopwatch()
        code, last = run.end()
        watch.within(bound_s + CLEAN_S, f"learner hangs in {where}, to the end")
    assert code == 7, run.output
    assert f"learner 0 did nothing but {stage} for {bound_s} s (timeouts.{bound})" in last
    log = folder / "logs" / "learner-0.log"
    assert str(log) in last and f"in {where}" in log.read_text() and "oatlite train --config" in last


@pytest.mark.fault("3")
def test_an_actor_that_hangs_ends_the_run_with_its_stacks(llama: Inputs, tmp_path: Path) -> None:
    """It may start again within the time that it has to answer, so that is no less than the time to start."""
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    more = ("--set", f"timeouts.start_s={START_S}", "--set", f"timeouts.generate_s={START_S}")
    with live(command(llama, folder, *more), folder, engine.environment) as run:
        run.wait_for("actor 0", "generate: 8 samples")
        engine.set("hang")
        watch = Stopwatch()
        code, last = run.end(DEADLINE_S)
        watch.within(START_S + CLEAN_S, "actor hangs, to the end")
    assert code == 7, run.output
    assert "actor-0 has not answered a request to generate in time" in last
    assert "in told_step" in (folder / "logs" / "actor-0.log").read_text()


@pytest.mark.long
@pytest.mark.fault("3")
def test_an_actor_that_hangs_as_it_starts_ends_the_run_with_its_stacks(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("hang")
    with live(command(llama, folder, "--set", f"timeouts.start_s={START_S}"), folder, engine.environment) as run:
        run.wait_for("actor 0", "starting: warm-up")
        watch = Stopwatch()
        code, last = run.end(DEADLINE_S)
        watch.within(START_S + CLEAN_S, "actor hangs as it starts, to the end")
    assert code == 7, run.output
    assert f"starting: warm-up for {START_S} s" in last or "actor-0 has not started in time" in last
    assert "in told_step" in (folder / "logs" / "actor-0.log").read_text()

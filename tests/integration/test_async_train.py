"""``oatlite train --async``: actors that sample while the learner learns, on real engines."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from live import EngineMode, live, resident_bytes
from runs import Inputs, Run, command, leftovers, read_lines, train
from safetensors.torch import load_file
from test_resume import resume

SLOW_LEARNER = f"{Path(__file__).parents[2] / 'benchmarks' / 'sleeping_algorithm.py'}:SleepingSimPO"
FLAT_BYTES = 48 << 20

STRICT = (
    *("--async", "--set", "rollout.strict_staleness=true", "--algo", "simpo", "--actors", "2"),
    *("--epochs", "2", "--set", "learner.importance_cap=2.0"),
)


@pytest.fixture(scope="module")
def strict(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps, each but the first sampled by the version before the last."""
    run = train(llama, tmp_path_factory.mktemp("runs") / "strict", *STRICT)
    assert run.exit_code == 0, run.output
    return run


def test_samples_are_one_version_old_and_say_so(strict: Run) -> None:
    steps = strict.records("step")
    assert [record["staleness"] for record in steps] == [0, 1, 1, 1, 1, 1]
    assert [record["policy_version"] for record in steps] == [0, 0, 1, 2, 3, 4]
    pairs = read_lines(strict.folder / "samples.jsonl")
    assert {(pair["step"], pair["policy_version"]) for pair in pairs} == set(enumerate([0, 0, 1, 2, 3, 4], 1))
    assert steps[0]["mismatch_mean"] < 1e-4 and all("mismatch_mean" not in record for record in steps[1:])
    assert steps[0]["drift"] == pytest.approx(0, abs=1e-3)
    assert steps[0]["importance"] == pytest.approx(1, abs=1e-3)
    assert all(abs(record["drift"]) > 1e-3 for record in steps[1:]), "the learner has moved on from what sampled"
    assert [record["step"] for record in strict.records("eval")] == [0, 2, 4, 6]
    assert leftovers(strict.folder) == []


@pytest.mark.fault("1")
def test_a_strict_run_is_the_same_when_an_actor_is_killed_in_it(strict: Run, llama: Inputs, tmp_path: Path) -> None:
    """The successor is brought to the version that its batch was asked of, while the learner is at work on another."""
    folder = tmp_path / "run"
    engine = EngineMode(tmp_path / "mode")
    engine.set("slow")
    with live(command(llama, folder, *STRICT), folder, engine.environment) as run:
        for step, number in ((1, 0), (2, 1)):
            run.wait_for(f"step {step}/6")  # and sampling goes on at once, for four seconds
            run.send(f"actor-{number}", signal.SIGKILL)
            run.wait_for(f"actor {number} was killed by SIGKILL; restart 1 of 3")
        engine.set("fast")
        code, _ = run.end()
    assert code == 0, run.output
    assert Run(folder, code, "").metrics() == strict.metrics()
    assert (folder / "samples.jsonl").read_text() == (strict.folder / "samples.jsonl").read_text()
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (folder, strict.folder))
    assert all((weights[name] == others[name]).all() for name in weights)


@pytest.mark.long
def test_two_ranks_sample_ahead_and_a_stop_says_what_is_lost(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--async", "--max-staleness", "2", "--algo", "dpo", "--actors", "2", "--learners", "2", "--epochs", "3")
    with live(command(llama, folder, *more), folder) as run:
        run.wait_for("step 3/9")
        run.process.send_signal(signal.SIGTERM)
        code, last = run.end()
    assert code == 143 and "oatlite resume" in last, run.output
    before = Run(folder, code, "").records("step")
    [lost] = [line for line in run.lines if "judged ahead" in line]
    num_lost = int(lost.split("stopping: ")[1].split()[0])
    assert num_lost > 0
    done = resume(folder)
    assert done.exit_code == 0, done.output
    steps = done.records("step")
    assert [record["step"] for record in steps] == list(range(1, 10))
    assert max(record["staleness"] for record in steps) <= 2
    assert steps[: len(before)] == before
    following = steps[len(before)]
    pairs = [pair for pair in read_lines(folder / "samples.jsonl") if pair["step"] == following["step"]]
    num_asked = sum(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert following["queries"] == before[-1]["queries"] + num_lost + num_asked, "what was lost counts as asked"
    assert leftovers(folder) == []


@pytest.mark.fault("17")
def test_a_learner_slower_than_its_actors_is_waited_for_and_nothing_is_lost(llama: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--async", "--max-staleness", "1", "--actors", "2", "--epochs", "4", "--eval-every", "12")
    slow = ("--algo", SLOW_LEARNER, "--set", "algorithm.options.seconds=0.5")  # two seconds a step
    with live(command(llama, folder, *more, *slow), folder) as run:
        sizes = []
        for step in (4, 11):  # the first steps take what memory they take, and the last is not yet over
            run.wait_for(f"step {step}/12")
            sizes.append({role: resident_bytes(run.pid(role)) for role in ("actor-0", "actor-1", "learner-0")})
        code, _ = run.end()
    assert code == 0, run.output
    growth = {role: sizes[1][role] - sizes[0][role] for role in sizes[0]}
    print("FAULT growth in seven steps in MiB:", {role: num_bytes >> 20 for role, num_bytes in growth.items()})
    assert max(growth.values()) < FLAT_BYTES, growth
    done = Run(folder, code, "")
    steps = done.records("step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["staleness"] for record in steps] == [0] + [1] * 11, "as far ahead as they may, and no further"
    asked = [pair for pair in read_lines(folder / "samples.jsonl") if pair["chosen"] != pair["rejected"]]
    assert len(asked) == steps[-1]["queries"] == sum(record["trained_pairs"] for record in steps)

"""A run that was killed, or asked to stop, and is resumed equals one that was never stopped, bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from live import CLEAN_S, EngineMode, Stopwatch
from oatlite_cli.main import main
from runs import (
    DEADLINE_S,
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
from safetensors.torch import load_file, save_file

from oatlite.checkpoint import _digest_of_manifest, complete

COMMON = ("--max-prompts", "48", "--epochs", "3", "--save-every", "4", "--eval-every", "3")
ONE_RANK = ("--algo", "simpo")
# Everything at once that makes a checkpoint hold more: shards, replayed pairs, a behaviour that lags behind.
TWO_RANKS = (
    *("--algo", "kto", "--actors", "2", "--learners", "2", "--micro-batch-size", "4", "--sync-every", "3"),
    *("--set", "learner.zero_stage=3", "--set", "learner.buffer_size=32", "--set", "learner.passes=2"),
)
# The adapter alone is saved and sent, and the reference is the policy's own base, in shards too.
ADAPTER = (
    *("--algo", "dpo", "--actors", "2", "--learners", "2", "--micro-batch-size", "4", "--lora-rank", "4"),
    *("--set", "learner.zero_stage=3", "--set", "lora.sync=adapter"),
)
# No actors; the pairs were read, and the reference point of KTO goes over both ranks. A pair at a time, and twice over,
# it takes as long as with actors.
OFFLINE = (
    *("--offline", "--algo", "kto", "--learners", "2", "--micro-batch-size", "1", "--set", "learner.passes=2"),
    *("--set", "learner.zero_stage=3", "--set", "learner.buffer_size=32"),
)
# The epistemic head with its comparisons, on two ranks that must hold the same one.
EXPLORED = (
    *("--algo", "dpo", "--actors", "2", "--learners", "2", "--micro-batch-size", "4"),
    *("--explore", "sea-bai", "--num-candidates", "3", "--set", "explore.members=5", "--best-of-n", "2"),
    *("--set", "explore.self_label_ratio=0.25", "--set", "explore.burn_in=2"),
)
# Where it alone learns, the actors hold one policy version to the end.
HEAD_ONLY = (
    *("--actors", "2", "--learners", "2", "--micro-batch-size", "4", "--set", "learner.zero_stage=3"),
    *("--explore", "sea-ee", "--num-candidates", "3", "--set", "explore.members=5", "--best-of-n", "2"),
    *("--set", "explore.head_only=true"),
)
# Some prompts are answered by the policy alone, the same ones again.
SHARED = (
    *("--algo", "dpo", "--actors", "2", "--learners", "2", "--micro-batch-size", "4"),
    *("--sampler", "mixture", "--set", "rollout.policy_share=0.3"),
)


def wait_for_line(process: subprocess.Popen[str], words: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"no {words!r} in:\n{seen}")


def resume(run: Path, *more: str) -> Run:
    return run_to_end([str(OATLITE), "resume", str(run), *more], run)


def wait_until_gone(run: Path) -> None:
    deadline = time.monotonic() + 30
    while leftovers(run):
        assert time.monotonic() < deadline, leftovers(run)
        time.sleep(0.1)


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = Run(one, 0, ""), Run(other, 0, "")
    assert first.metrics() == second.metrics()
    assert read_lines(one / "samples.jsonl") == read_lines(other / "samples.jsonl")
    evaluations = sorted(path.name for path in (one / "eval").iterdir())
    assert evaluations == sorted(path.name for path in (other / "eval").iterdir())
    for name in evaluations:
        assert read_lines(one / "eval" / name) == read_lines(other / "eval" / name)
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in weights)


@pytest.fixture(scope="module")
def whole(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train(llama, tmp_path_factory.mktemp("runs") / "whole", *ONE_RANK, *COMMON)
    assert run.exit_code == 0, run.output
    return run.folder


@pytest.fixture(scope="module")
def killed(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank whose supervisor was killed soon after its fifth step; its one checkpoint is of the fourth."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    kill_after_step_5(run, llama, ONE_RANK)
    return run


def kill_after_step_5(run: Path, inputs: Inputs, case: tuple[str, ...]) -> Stopwatch:
    """With engines so slow that the eighth step, which is saved, is seconds away. Returns the time since the kill."""
    engine = EngineMode(run.parent / f"{run.name}.mode")
    engine.set("slow")
    process = start_command(command(inputs, run, *case, *COMMON), engine.environment | {"ENGINE_SLOW_S": "0.15"})
    try:
        wait_for_line(process, "step 5/9")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        watch = Stopwatch()
        process.communicate()
    wait_until_gone(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    return watch


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@pytest.mark.fault("10", "13")
def test_a_killed_run_goes_on_as_if_nothing_had_been(whole: Path, killed: Path, tmp_path: Path) -> None:
    run = copied(killed, tmp_path / "run")
    (run / "checkpoints" / ".writing-step-000008").mkdir()
    watch = Stopwatch()
    done = resume(run)
    assert done.exit_code == 0, done.output
    watch.within(DEADLINE_S, "killed run of one rank, from the command that resumes it to its end")
    assert ".writing-step-000008 was not complete" in done.output
    assert "resuming after step 4" in done.output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000009"]
    assert_equal_runs(whole, run)
    again = resume(run)
    assert again.exit_code == 2
    assert "is finished" in again.output


@pytest.mark.fault("9")
@pytest.mark.parametrize(
    "more",
    [pytest.param((), id="prompts"), pytest.param(("--max-queries", "100"), id="queries", marks=pytest.mark.long)],
)
def test_a_run_whose_model_was_not_saved_is_resumed_after_its_last_step(
    more: tuple[str, ...], whole: Path, llama: Inputs, tmp_path: Path
) -> None:
    """Bounded by its prompts, or by its queries."""
    if more:
        whole = train(llama, tmp_path / "whole", *ONE_RANK, *COMMON, *more).folder
    run = copied(whole, tmp_path / "run")
    half = (run / "model").rename(run / ".model.x1y2z3_w")  # as its writer leaves it, when it is killed
    done = resume(run)
    assert done.exit_code == 0, done.output
    assert f"{half.name} was not complete when its run ended, and is skipped" in done.output
    assert_equal_runs(whole, run)
    assert not list(run.glob(".*"))


@pytest.mark.fault("13")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(TWO_RANKS, id="two ranks"),
        pytest.param(ADAPTER, id="adapter", marks=pytest.mark.long),
        pytest.param(OFFLINE, id="offline", marks=pytest.mark.long),
        pytest.param(EXPLORED, id="explored"),
        pytest.param(HEAD_ONLY, id="head only", marks=pytest.mark.long),
        pytest.param(SHARED, id="shared", marks=pytest.mark.long),
    ],
)
def test_ranks_go_on_as_if_nothing_had_been(case: tuple[str, ...], llama: Inputs, tmp_path: Path) -> None:
    undisturbed = train(llama, tmp_path / "whole", *case, *COMMON)
    assert undisturbed.exit_code == 0, undisturbed.output
    killing = kill_after_step_5(tmp_path / "killed", llama, case)
    done = resume(tmp_path / "killed")
    assert done.exit_code == 0, done.output
    killing.within(DEADLINE_S, "run that is killed, to the end of the one that resumes it")
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.fault("7")
def test_sigterm_to_every_process_finishes_the_step_and_saves_it(llama: Inputs, tmp_path: Path) -> None:
    """As a batch system sends it; to the supervisor alone it comes to the same."""
    run = tmp_path / "terminated"
    process = start(llama, run, *ONE_RANK, *COMMON)
    seen = wait_for_line(process, "step 1/9")
    for pid in (*worker_pids("actor-0"), *worker_pids("learner-0"), process.pid):
        os.kill(pid, signal.SIGTERM)
    watch = Stopwatch()
    rest, _ = process.communicate(timeout=60)
    watch.within(60, "SIGTERM to every process, to the end")
    assert process.returncode == 143, seen + rest
    last = rest.strip().splitlines()[-1]
    (saved,) = complete(run / "checkpoints")
    saved.verify()
    assert 1 <= saved.step < 9
    assert [record["step"] for record in Run(run, 143, "").records("step")] == list(range(1, saved.step + 1))
    assert "terminated, saved" in last and f"step {saved.step}: oatlite resume" in last
    assert leftovers(run) == []


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    capsys.readouterr()
    logs = {path: path.stat().st_mtime_ns for path in (Path(arguments[0]) / "logs").glob("*")}
    assert main(["resume", *arguments]) == code
    assert {path: path.stat().st_mtime_ns for path in logs} == logs, "no worker was started"
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("oatlite: error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.fault("12")
@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["placement.learners=2", "placement.actors=2"], ["placement.learners was 1 and is 2"]),
        (["run.seed=7"], ["run.seed was 0 and is 7"]),
        (["learner.lr=1e-5", "data.epochs=4"], ["learner.lr", "data.epochs was 3 and is 4"]),
    ],
)
def test_another_run_is_refused_with_what_differs(
    sets: list[str], words: list[str], killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, 2, str(killed), *(word for setting in sets for word in ("--set", setting)))
    assert all(word in line for word in words), line


def with_model_of_its_own(killed: Path, model: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a run, and of a model that it was started with."""
    run = copied(killed, folder / "run")
    own = Path(shutil.copytree(model, folder / model.name))
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(model), str(own)))
    path = run / "checkpoints" / "step-000004" / "manifest.json"
    manifest = json.loads(path.read_text().replace(str(model), str(own)))
    manifest.pop("digest")
    path.write_text(json.dumps(manifest | {"digest": _digest_of_manifest(manifest)}))
    return run, own


def change_weights(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] += 1.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.fault("12")
def test_other_weights_of_the_same_shape_are_refused(
    killed: Path, llama: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, policy = with_model_of_its_own(killed, llama.policy, tmp_path)
    change_weights(policy, "model.embed_tokens.weight")
    watch = Stopwatch()
    line = refused(capsys, 2, str(run))
    watch.within(CLEAN_S, "resumed with other weights, until it is refused")
    assert "the initial policy is another one" in line and "the reference is another one" in line
    assert "the model is another one" not in line and "the reward model is another one" not in line


@pytest.mark.fault("12")
def test_another_reward_model_is_refused(
    killed: Path, llama: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, reward_model = with_model_of_its_own(killed, llama.reward_model, tmp_path)
    change_weights(reward_model, "score.weight")
    line = refused(capsys, 2, str(run))
    assert "the reward model is another one" in line and "policy is another one" not in line


@pytest.mark.fault("12")
def test_another_model_is_refused(
    killed: Path, llama: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, policy = with_model_of_its_own(killed, llama.policy, tmp_path)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert "the model is another one" in refused(capsys, 2, str(run))


@pytest.mark.fault("12")
def test_another_tokenizer_is_refused(
    killed: Path, llama: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, policy = with_model_of_its_own(killed, llama.policy, tmp_path)
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (policy / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(capsys, 2, str(run))
    assert "the tokenizer is another one" in line
    assert "the model is another one" not in line


@pytest.mark.fault("11")
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_not_used(
    damage: str, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(killed, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-000004", run / "checkpoints" / "step-000002")
    older = run / "checkpoints" / "step-000002" / "manifest.json"
    older.write_text(older.read_text().replace('"step": 4', '"step": 2', 1))
    file = run / "checkpoints" / "step-000004" / "optimizer" / "mp_rank_00_model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flip":
            file.write_bytes(data)
        case "cut":
            file.write_bytes(data[:-1])
        case "remove":
            file.unlink()
    line = refused(capsys, 4, str(run))
    assert str(file) in line and "--from-step 2" in line
    assert "of 4, 2" in refused(capsys, 4, str(run), "--from-step", "3")


def test_a_run_that_is_still_going_on_is_left_alone(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (killed / "config.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its supervisor holds it
        assert "still going on" in refused(capsys, 2, str(killed))


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_what_is_no_run_is_one_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no folder of a run" in refused(capsys, 2, str(tmp_path / folder))

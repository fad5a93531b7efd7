"""Records, their mean, their summary, and the files and processes that they go to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oatlite.errors import StorageError
from oatlite.metrics.records import Mean, make_record
from oatlite.metrics.sinks import JsonlSink, WandbSink
from oatlite.metrics.summary import History, duration, is_reward_hacking, summary_lines
from oatlite.metrics.wandb_process import flat

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_means_of_parts_add_up_to_the_mean_of_the_whole(parts: list[list[float]]) -> None:
    total = Mean()
    for part in parts:
        mean = Mean()
        mean.extend(part)
        total = total + mean
    whole = [value for part in parts for value in part]
    assert total.count == len(whole)
    assert total.value == pytest.approx(sum(whole) / len(whole), abs=1e-6)


def test_a_weight_of_zero_adds_nothing() -> None:
    mean = Mean()
    assert mean.value is None
    mean.add(float("nan"), weight=0)
    assert mean.value is None
    mean.add(2.0, weight=3)
    mean.add(6.0)
    assert mean.value == 3.0


def test_records_have_one_order_and_finite_numbers() -> None:
    record = make_record(
        "step",
        perf={"zeta": 1, "step_s": 2.0},
        own_metric=1,
        loss=Mean(3.0, 2),
        kl=Mean(),
        margin=None,
        reward=float("nan"),
        policy_version=4,
        step=5,
    )
    assert list(record) == ["kind", "step", "policy_version", "loss", "reward", "own_metric", "perf"]
    assert record["loss"] == 1.5
    assert record["reward"] is None
    assert list(record["perf"]) == ["step_s", "zeta"]


def test_records_take_scalars_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    record = make_record("eval", step=numpy.int64(3), win_rate=numpy.float32(0.5), flag=numpy.bool_(True))
    assert json.dumps(record) == '{"kind": "eval", "step": 3, "win_rate": 0.5, "flag": true}'


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("stepp", {"step": 1, "policy_version": 1}),
        ("step", {"epoch": 1}),
        ("eval", {"win_rate": 1.0}),
        ("eval", {"step": 1, "Bad name": 1.0}),
        ("eval", {"step": 1, "kind": "step"}),
        ("eval", {"step": 1, "texts": {"nested": 1}}),
    ],
)
def test_malformed_records_are_refused(kind: str, metrics: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        make_record(kind, **metrics)  # type: ignore[arg-type]


# Files


def test_jsonl_is_on_disk_after_each_record_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path) as sink:
        sink.write(
            {"kind": "step", "loss": float("nan"), "texts": ["a\nb", "ü", "\ud800"], "perf": {"s": float("inf")}}
        )
        line = path.read_text(encoding="utf-8")
        assert line.count("\n") == 1
        record = json.loads(line, parse_constant=pytest.fail)
        assert record == {"kind": "step", "loss": None, "texts": ["a\nb", "ü", "?"], "perf": {"s": None}}


@pytest.mark.parametrize("torn", ["", '{"step": 2', '{"step": 2, "text": "' + "x" * 200_000])
def test_a_torn_line_is_cut_off_before_more_is_written(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    with JsonlSink(path) as sink:
        sink.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_full_disk_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    sink = JsonlSink.__new__(JsonlSink)
    sink.path = Path("/dev/full")
    sink._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        sink.write({"step": 1})
    sink._file.close()


def test_a_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open"):
        JsonlSink(tmp_path)


# Weights & Biases: a stand-in package takes the real one's place in the process that the sink starts


FAKE_WANDB = """
    import json, os, sys, time

    class Settings:
        model_fields = {"silent": None}
        def __init__(self, **given): pass

    def init(*, project, name, dir, config, settings, mode=None, **resumed):
        behaviour = os.environ["FAKE_WANDB"]
        if behaviour == "hangs": time.sleep(600)
        if behaviour == "fails": raise RuntimeError("no\\nway")
        if behaviour == "refuses" and mode != "offline": raise ConnectionError("unreachable")
        if behaviour == "is silent":
            with open(os.path.join(dir, "starts"), "a") as file: print(mode, file=file)
            time.sleep(2.5 if mode == "offline" else 600)
        told = dict(project=project, name=name, config=config, mode=mode, **resumed)
        return Run(os.path.join(dir, "log.json"), [told])

    class Run:
        def __init__(self, path, log):
            self.path, self.entries, self.summary = path, log, {}
        def log(self, values, step): self.entries.append(dict(values, at=step))
        def finish(self):
            with open(self.path, "w") as file: json.dump(self.entries + [self.summary], file)
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    return tmp_path


def _log_to_wandb(folder: Path, warnings: list[str], close_s: float) -> WandbSink:
    sink = WandbSink("p", "n", folder, {"seed": 1}, warn=warnings.append, close_s=close_s)
    sink.write({"kind": "step", "step": 1, "loss": 0.5, "perf": {"step_s": 1.0}})
    sink.write({"kind": "eval", "step": 1, "win_rate": float("nan")})
    sink.write({"kind": "summary", "steps": 1})
    return sink


def test_wandb_gets_every_record(fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WANDB", "works")
    warnings: list[str] = []
    _log_to_wandb(fake_wandb, warnings, 30).close()
    assert warnings == []
    assert json.loads((fake_wandb / "log.json").read_text()) == [
        {"project": "p", "name": "n", "config": {"seed": 1}, "mode": None},
        {"train/loss": 0.5, "perf/step_s": 1.0, "at": 1},
        {"eval/win_rate": None, "at": 1},
        {"summary/steps": 1},
    ]


def test_a_resumed_run_goes_on_in_wandb_too(fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WANDB", "works")
    before = fake_wandb / "wandb" / "offline-run-20261127_010203-a1b2c3d4"
    before.mkdir(parents=True)
    (before.parent / "latest-run").symlink_to(before.name)
    _log_to_wandb(fake_wandb, [], 30).close()
    started = json.loads((fake_wandb / "log.json").read_text())[0]
    assert (started["id"], started["resume"]) == ("a1b2c3d4", "allow")


@pytest.mark.fault("20")
@pytest.mark.parametrize(
    ("behaviour", "close_s", "words"), [("hangs", 1, "within 1 s"), ("fails", 30, "no way"), ("refuses", 30, "offline")]
)
def test_trouble_with_wandb_is_one_warning(
    fake_wandb: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, close_s: float, words: str
) -> None:
    monkeypatch.setenv("FAKE_WANDB", behaviour)
    warnings: list[str] = []
    sink = _log_to_wandb(fake_wandb, warnings, close_s)
    process = sink._process
    assert process is not None
    sink.close()
    assert process.poll() is not None, "nothing outlives close()"
    assert len(warnings) == 1
    assert words in warnings[0]


def test_a_backlog_for_wandb_is_dropped_with_one_warning(fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WANDB", "hangs")
    warnings: list[str] = []
    sink = _log_to_wandb(fake_wandb, warnings, 0.5)
    for _ in range(5000):
        sink.write({"kind": "step", "step": 2, "text": "x" * 1000})
    sink.close()
    assert len(warnings) == 1
    assert "takes no more" in warnings[0]


def test_the_wandb_process_ends_with_its_input(fake_wandb: Path) -> None:
    start = {"project": "p", "name": "n", "dir": str(fake_wandb), "config": {}, "learner": os.getpid(), "close_s": 0.2}
    done = subprocess.run(
        [sys.executable, "-m", "oatlite.metrics.wandb_process"],
        input=json.dumps(start) + "\n",
        text=True,
        env=os.environ | {"FAKE_WANDB": "hangs"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1


def test_wandb_is_started_once_more_and_not_twice(fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, where starting takes longer than what is waited for a server at the end."""
    monkeypatch.setenv("FAKE_WANDB", "is silent")
    warnings: list[str] = []
    sink = _log_to_wandb(fake_wandb, warnings, 10)
    for step in range(500):
        sink.write({"kind": "step", "step": step, "loss": 0.5})
    sink.close()
    assert (fake_wandb / "starts").read_text().split() == ["None", "offline"]
    assert len(warnings) == 1 and "kept offline" in warnings[0]
    assert len(json.loads((fake_wandb / "log.json").read_text())) == 504


def test_names_in_wandb_are_grouped() -> None:
    assert flat({"kind": "eval", "step": 1, "win_rate": 0.5, "perf": {"eval_s": 2}}) == {
        "eval/win_rate": 0.5,
        "eval_perf/eval_s": 2,
    }


# Summary


def _history(rewards: list[float], golds: list[float]) -> History:
    history = History()
    for step, (reward, gold) in enumerate(zip(rewards, golds, strict=True)):
        history.add({"kind": "eval", "step": step, "win_rate": 0.5 + step / 10, "reward": reward, "gold_score": gold})
        history.add({"kind": "step", "step": step, "queries": 64 * step, "perf": {"generate_s": 3.0, "learn_s": 1.0}})
    return history


def test_the_summary_of_a_run() -> None:
    lines = "\n".join(summary_lines(_history([1.0, 2.0], [1.0, 2.0]), {"model": "m", "next": ["a", "b"]}, 75))
    assert "done: 1 steps, 64 oracle queries, 1:15" in lines
    assert "50.0% -> 60.0%  (+10.0 points)" in lines
    assert "generate 75%  learn 25%" in lines
    assert "hacking" not in lines
    assert lines.endswith("next        a\n              b")


@pytest.mark.parametrize(
    ("rewards", "golds", "expected"),
    [([1, 2], [2, 1], True), ([1, 2], [1, 2], False), ([2, 1], [2, 1], False), ([1], [1], False)],
)
def test_reward_hacking_is_reward_up_and_gold_score_down(
    rewards: list[float], golds: list[float], expected: bool
) -> None:
    history = _history(rewards, golds)
    assert is_reward_hacking(history) is expected
    assert ("hacking" in "\n".join(summary_lines(history, {}, 1))) is expected


def test_a_summary_of_nothing() -> None:
    assert list(summary_lines(History(), {}, 0)) == ["done: 0 steps, 0:00"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01"), (-1, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

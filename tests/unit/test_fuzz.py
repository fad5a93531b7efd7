"""The fuzzing benchmark, small: spoiled frames, live sockets and configurations, and that its judges can object."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzz
import fuzz_runs
from fuzz import reaches_outside
from fuzz_frames import SPOIL, fault_of, frames_of, real_messages, spoiled
from fuzz_preflight import preflight_outcome
from fuzz_settings import outcome
from fuzz_sockets import Live, live

from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.messages import MESSAGES, WeightManifest
from oatlite.messages.codec import decode
from oatlite.preflight import Plan
from oatlite.weights import Layout


def test_spoiled_frames_are_refused_or_are_valid_messages() -> None:
    decoded = fuzz.fuzz_decoder(random.Random(1), 20_000)
    assert decoded.faults == []
    assert decoded.slowest_s < fuzz.SLOWEST_S
    assert set(decoded.refused) == {way.__name__ for way in SPOIL}
    assert 10_000 < decoded.refused.total() < 19_900 and decoded.valid.total() > 500
    assert decoded.refused.total() + decoded.same.total() + decoded.valid.total() == 20_000


def test_spoiled_frames_in_live_sockets_are_dropped_while_real_messages_arrive() -> None:
    generator = random.Random(2)
    originals = [frames_of(message) for message in real_messages(generator)]
    lively = live(generator, originals, 500)
    assert lively.answered == lively.asked == 100
    assert lively.faults == []
    assert lively.taken + sum(lively.dropped.values()) == lively.sent == 500, "nothing is lost silently"
    assert lively.dropped["malformed"] > 300 and lively.dropped["foreign"] > 0 and lively.taken > 0


def test_spoiled_configurations_are_refused_in_one_line_or_repeat_themselves_and_could_be_run() -> None:
    found = fuzz.fuzz_settings(random.Random(3), 100)
    assert set(found) == set(fuzz.KNOWN)
    assert found["refused"] > 50 and found["valid"] > 3


# --------------------------------------------------------------------------- that the judges can object


def test_every_kind_of_message_is_spoiled_in_every_way() -> None:
    generator = random.Random(0)
    originals = [frames_of(message) for message in real_messages(generator)]
    assert len(originals) == len(MESSAGES)
    for way in SPOIL:
        for frames in originals:
            results = [way(generator, frames, originals) for _ in range(60)]
            assert any(result != frames for result in results) or (way.__name__, len(frames)) == ("swap", 1)


@pytest.mark.parametrize("message", real_messages(random.Random(0)), ids=lambda message: type(message).__name__)
def test_a_real_message_has_no_fault_and_one_with_values_of_other_types_has(message) -> None:
    assert fault_of(decode(frames_of(message))) is None
    for field in dataclasses.fields(message):
        for value in (None, np.zeros(1), -(2**70)):
            assert fault_of(dataclasses.replace(message, **{field.name: value})) is not None


def test_a_message_whose_parts_do_not_agree_has_a_fault() -> None:
    (request,) = [m for m in real_messages(random.Random(0)) if type(m).__name__ == "GenerateRequest"]
    request = decode(frames_of(request))
    assert "cannot be sent" in str(fault_of(dataclasses.replace(request, samplers=["policy"] * 9)))


def test_a_manifest_that_would_be_believed_and_reaches_outside_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    (manifest,) = [m for m in real_messages(random.Random(0)) if isinstance(m, WeightManifest)]
    assert not reaches_outside(manifest)
    shrunk = dataclasses.replace(manifest, buffer_bytes=1)
    assert not reaches_outside(shrunk), "it is refused"
    layout = Layout.from_manifest(manifest)
    monkeypatch.setattr("fuzz.Layout.from_manifest", lambda _: layout)
    assert reaches_outside(shrunk)


def test_whatever_does_not_keep_the_claim_is_told() -> None:
    decoded = fuzz.Decoded(faults=["a fault"], slowest_s=fuzz.SLOWEST_S + 1, memory=[i << 20 for i in range(100)])
    lively = Live(sent=20, asked=4, answered=4, dropped={"malformed": 19}, taken=1, faults=[], memory=[1] * 40)
    assert fuzz.faults(fuzz.Decoded(memory=[1] * 40), lively, Counter(fuzz.KNOWN)) == []
    lively = dataclasses.replace(lively, answered=1, taken=0, dropped={})
    told = fuzz.faults(decoded, lively, Counter({"not one line: 'x'": 1}))
    for words in ("a fault", "not one line", "over one message", "were lost", "frames sent", "memory grew"):
        assert any(words in line for line in told), words


def test_a_configuration_that_is_refused_in_two_lines_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "given.toml"
    file.write_text("[learner]\nlr = -1.0\n")
    given = {"preset": None, "file": file, "sets": [], "num_gpus": 0}
    assert outcome(given, tmp_path) == "refused"
    monkeypatch.setattr("oatlite.errors.OatliteError.__str__", lambda self: "one\ntwo")
    assert "not one line" in outcome(given, tmp_path)


def test_what_is_wrong_with_a_check_before_a_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Config) -> Plan:
        raise ConfigError("refused")

    config = resolve(load_config(num_gpus=0), 0)
    monkeypatch.setattr("fuzz_preflight.with_demo", lambda config: config)
    monkeypatch.setattr("fuzz_preflight.check", lambda config: SimpleNamespace(total_steps=0))
    assert preflight_outcome(config) == "a plan of no step"
    monkeypatch.setattr("fuzz_preflight.check", refuse)
    assert preflight_outcome(config) == "refused before a start"
    monkeypatch.setattr("oatlite.errors.OatliteError.__str__", lambda self: "one\ntwo")
    assert "not one line" in preflight_outcome(config)


def test_a_seed_gives_the_same_frames_again() -> None:
    def some() -> list[tuple[str, list[bytes]]]:
        generator = random.Random(7)
        originals = [frames_of(message) for message in real_messages(generator)]
        return [spoiled(generator, originals) for _ in range(200)]

    assert some() == some()


@pytest.mark.parametrize(
    ("says", "code", "how"),
    [
        ("oatlite: error: no", 2, fuzz_runs.ENDED),
        ("Traceback (most recent call last):\noatlite: error: no", 2, "run-0 ended with code 2: oatlite: error: no"),
        ("KeyError: 1", 1, "run-0 ended with code 1: KeyError: 1"),
        ("done", 0, "run-0 ended with code 0: done"),  # and has left no model
    ],
)
def test_how_a_run_of_a_valid_configuration_ended_is_told(
    says: str, code: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    program.chmod(0o700)
    monkeypatch.setattr(fuzz_runs.sys, "executable", str(program))
    assert fuzz_runs.run(Config(), tmp_path, "run-0") == how

"""Both ends of ``/get_feedback`` against oat's other end, which is written here from its behaviour.

Fields, paths and which of them are empty are those of ``oat/oracles/remote`` in oat 0.2.3 (commit c1a074c).
"""

import contextlib
import math
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mosec import ClientError, ValidationError

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from misbehaving import sends, serving
from oats_feedback import (
    oats_server,
    old_preference_body,
    preference_body,
    read_scores,
    read_win_probs,
    reward_body,
)

from oatlite.config.schema import RemoteConfig
from oatlite.oracles import PreferenceOracle, RewardOracle, Verdicts
from oatlite.oracles.feedback import (
    MAX_PAIRS,
    BadMessage,
    decode_request,
    decode_verdicts,
    encode_comparison,
    encode_verdicts,
)
from oatlite.oracles.remote import RemoteOracle
from oatlite.oracles.server import Gate, answers

texts = st.lists(st.text(max_size=20), max_size=5)
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """Where a worker has noted that it is ready, and scores."""
    (tmp_path / "ready-1").write_text("scores")
    monkeypatch.setenv("OATLITE_SERVER_NOTES", str(tmp_path))
    monkeypatch.delenv("OATLITE_ORACLE_TOKEN", raising=False)
    return tmp_path


def score(prompt, response):
    return math.sin(len(prompt) + 3 * len(response))


class SineOracle(RewardOracle):
    """Rewards by length; an empty response has none. It remembers the sizes of its batches and the references."""

    def __init__(self):
        self.sizes, self.references = [], []

    def score(self, prompts, responses, references=None):
        self.sizes.append(len(prompts))
        self.references.append(references)
        return np.array(
            [score(*pair) if pair[1] else np.nan for pair in zip(prompts, responses, strict=True)], np.float32
        )


class FirstWins(PreferenceOracle):
    """Compares, and has no scores."""

    def compare(self, prompts, first, second, references=None):
        return Verdicts(first_win=np.ones(len(prompts), np.float32), is_valid=np.ones(len(prompts), np.bool_))


def asked(oracle, *bodies):
    """As the server does: each body past the gate, and then all of them to the oracle."""
    gate = Gate()
    return answers(oracle, [decode_request(gate.serialize_ipc(gate.deserialize(body))) for body in bodies])


# oat's client and our server


def test_oats_client_gets_its_win_probabilities():
    prompts, first, second = ["p", "prompt"], ["a", "bbb"], ["cc", "d"]
    expected = [1 / (1 + math.exp(score(p, b) - score(p, a))) for p, a, b in zip(prompts, first, second, strict=True)]
    for body in (preference_body(prompts, first, second), old_preference_body(prompts, first, second)):
        (answer,) = asked(SineOracle(), body)
        np.testing.assert_allclose(read_win_probs(answer), expected, rtol=1e-6)
        assert all(isinstance(value, float) for value in read_win_probs(answer))
        assert read_scores(answer) == []


def test_oats_client_gets_its_rewards():
    (answer,) = asked(SineOracle(), reward_body(["p", "prompt"], ["a", "bbb"]))
    np.testing.assert_allclose(read_scores(answer), [score("p", "a"), score("prompt", "bbb")], rtol=1e-6)
    assert read_win_probs(answer) == []


def test_what_cannot_be_judged_is_said_and_is_no_verdict():
    (compared,) = asked(SineOracle(), preference_body(["p", "p"], ["a", ""], ["b", "c"]))
    assert msgpack.unpackb(compared)["batch_is_valid"] == [True, False]
    assert read_win_probs(compared)[1] == 0.5
    (scored,) = asked(SineOracle(), reward_body(["p", "p"], ["a", ""]))
    assert msgpack.unpackb(scored)["batch_is_valid"] == [True, False]
    assert math.isnan(read_scores(scored)[1])


def test_requests_that_ask_alike_are_one_batch_and_each_gets_its_own_answer():
    oracle = SineOracle()
    bodies = [
        preference_body(["p1", "p2"], ["a", "bb"], ["ccc", "dddd"]),
        reward_body(["p3"], ["eeeee"]),
        preference_body(["p4"], ["ffffff"], ["ggggggg"]),
        preference_body([], [], []),
        reward_body(["p5", "p6"], ["h", "ii"]),
    ]
    together = asked(oracle, *bodies)
    assert oracle.sizes == [6, 3], "three pairs, and three responses"
    assert together == [asked(SineOracle(), body)[0] for body in bodies]
    assert [len(read_win_probs(answer)) for answer in together] == [2, 0, 1, 0, 0]


def test_references_reach_an_oracle_that_reads_them():
    oracle = SineOracle()
    with_them = encode_comparison(["p"], ["a"], ["bb"], ["the answer"])
    asked(oracle, with_them, encode_comparison(["q"], ["a"], ["bb"]))
    assert oracle.references == [["the answer"] * 2, None]


def test_an_oracle_that_only_compares_refuses_to_score(notes):
    (notes / "ready-1").write_text("compares")
    (answer,) = asked(FirstWins(), preference_body(["p"], ["a"], ["b"]))
    assert read_win_probs(answer) == [1.0]
    assert "batch_first_score" not in msgpack.unpackb(answer)
    with pytest.raises(ValidationError, match="batch_candidates"):
        asked(FirstWins(), reward_body(["p"], ["a"]))


WRONG = {
    "empty": b"",
    "json": b'{"batch_prompt": []}',
    "a list": msgpack.packb([]),
    "no prompts": msgpack.packb({"batch_candidates": []}),
    "prompts that are numbers": msgpack.packb({"batch_prompt": [1]}),
    "bytes": msgpack.packb({"batch_prompt": [b"p"], "batch_response": ["a"]}),
    "nothing to judge": msgpack.packb({"batch_prompt": ["p"], "batch_response": [], "batch_candidates": []}),
    "both": msgpack.packb({"batch_prompt": ["p"], "batch_response": ["a"], "batch_candidates": [["a", "b"]]}),
    "three candidates": msgpack.packb({"batch_prompt": ["p"], "batch_candidates": [["a", "b", "c"]]}),
    "a pair too few": msgpack.packb({"batch_prompt": ["p", "q"], "batch_candidates": [["a", "b"]]}),
    "a reference too few": msgpack.packb(
        {"batch_prompt": ["p", "q"], "batch_response": ["a", "b"], "batch_reference": ["r"]}
    ),
    "a token that is no text": msgpack.packb({"batch_prompt": [], "token": 7}),
    "too many": msgpack.packb({"batch_prompt": ["p"] * (MAX_PAIRS + 1), "batch_response": []}),
    "cut": msgpack.packb({"batch_prompt": ["p"], "batch_response": ["a"]})[:-1],
    "no utf-8": b"\x81\xacbatch_prompt\x91\xa1\xff",
    "deep": b"\x91" * 100_000,
    "an object": b"\x81\xacbatch_prompt\xd4\x00\x00",
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
def test_a_malformed_request_stops_at_the_gate(body):
    with pytest.raises(ValidationError):
        Gate().deserialize(body)


@given(st.binary(max_size=200))
@settings(max_examples=300, suppress_health_check=SUPPRESSED)
def test_whatever_comes_is_a_message_or_refused(body):
    for read in (decode_request, lambda data: decode_verdicts(data, 2)):
        with contextlib.suppress(BadMessage):  # and nothing else
            assert len(read(body)) >= 0


def test_the_token_is_checked_at_the_gate(monkeypatch):
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", "gé heim")
    gate = Gate()
    for body in (preference_body(["p"], ["a"], ["b"]), encode_comparison(["p"], ["a"], ["b"], token="wrong")):
        with pytest.raises(ClientError, match="token") as error:
            gate.deserialize(body)
        assert "heim" not in str(error.value)
    right = encode_comparison(["p"], ["a"], ["b"], token="gé heim")
    assert decode_request(gate.deserialize(right)).prompts == ["p"]


# Our client and oat's server


def test_our_client_reads_oats_server():
    prompts = [f"prompt {'x' * i}" for i in range(7)]
    first, second = ["a" * i for i in range(7)], ["b" * (2 * i + 1) for i in range(7)]
    with serving(sends(oats_server(score))) as server:
        remote = RemoteOracle(RemoteConfig(url=server.url, batch_size=3), deadline_s=5)
        verdicts = remote.compare(prompts, first, second, references=["r"] * 7)
        remote.close()
    expected = [1 / (1 + math.exp(score(p, b) - score(p, a))) for p, a, b in zip(prompts, first, second, strict=True)]
    np.testing.assert_allclose(verdicts.first_win, expected, rtol=1e-6)
    assert verdicts.is_valid.all()
    assert verdicts.first_scores is None


# Our client and our server


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9), st.text(max_size=9)), max_size=6))
@settings(max_examples=50, suppress_health_check=SUPPRESSED)
def test_what_our_client_reads_is_what_the_oracle_said(rows):
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    (answer,) = asked(SineOracle(), encode_comparison(*columns))
    read, said = decode_verdicts(answer, len(rows)), SineOracle().compare(*columns)
    for name in ("first_win", "is_valid", "first_scores", "second_scores"):
        np.testing.assert_array_equal(getattr(read, name), getattr(said, name))


def test_a_verdict_that_is_not_valid_crosses_as_such():
    verdicts = Verdicts(first_win=np.array([np.nan, 0.25], np.float32), is_valid=np.array([False, True]))
    read = decode_verdicts(encode_verdicts(verdicts), 2)
    assert read.first_win.tolist() == [0.5, 0.25] and read.is_valid.tolist() == [False, True]

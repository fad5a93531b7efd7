"""A run whose oracle's server answers wrongly, or not at all: bounded retries, then the end with its address."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from live import Stopwatch
from misbehaving import Server, goes_away, hangs, hangs_up, sends, serving
from runs import Inputs, Run, leftovers, read_lines
from served import SOON_S, train_remote, within

from oatlite.oracles.calls import MAX_BAD_ANSWERS

Answer = Callable[[Any], None]
AGAIN_S, HANG_S = 20, 10


def answering(change: Callable[[list[float]], list[float]] = lambda win_probs: win_probs) -> Answer:
    """Sound answers, or what ``change`` makes of them."""

    def win_probs(body: bytes) -> list[float]:
        return [float(len(first) > len(second)) for first, second in msgpack.unpackb(body)["batch_candidates"]]

    return sends(lambda body: msgpack.packb({"batch_score": [], "batch_first_win_prob": change(win_probs(body))}))


GOOD = answering()
FAILS = sends(b"as if", code=500)
TOO_FEW, TOO_MANY = answering(lambda sound: sound[:-1]), answering(lambda sound: [*sound, 1.0])
NAN = answering(lambda sound: [*sound[:-1], float("nan")])
BOMB = sends(gzip.compress(b"\x00" * (64 << 20)), Content_Encoding="gzip")


@pytest.mark.fault("14")
@pytest.mark.parametrize(
    ("end", "num_requests", "words"),
    [
        (NAN, MAX_BAD_ANSWERS, "gives an answer that cannot be used"),
        (goes_away, 1, "cannot be reached: ConnectError"),
    ],
    ids=["keeps answering NaN", "goes away"],
)
def test_a_run_survives_a_server_that_comes_round_and_ends_with_6_where_it_does_not(
    end: Answer, num_requests: int, words: str, llama: Inputs, tmp_path: Path
) -> None:
    trial, first_eval, later_eval = [GOOD], [GOOD], [GOOD]
    steps = [FAILS, TOO_FEW, TOO_MANY, GOOD], [BOMB, hangs_up, GOOD], [end]
    settings = ("--set", "remote.batch_size=16", "--set", f"timeouts.oracle_s={AGAIN_S}")
    with serving(*trial, *first_eval, *steps[0], *steps[1], *later_eval, *steps[2]) as turning:
        run = train_remote(llama, tmp_path / "bad", "--oracle-url", turning.url, *settings)
        Stopwatch(turning.requests[10][3]).within(AGAIN_S + SOON_S, f"the server {words}, to the end")
    assert_ended_by(turning, run, words)
    assert len(turning.requests) == 10 + num_requests
    assert [record["step"] for record in run.records("eval")] == [0, 2]
    assert [record["perf"]["oracle_failures"] for record in run.records("step")] == [3, 2]
    assert [record["trained_pairs"] + record["unusable_pairs"] for record in run.records("step")] == [16, 16]
    assert [pair["step"] for pair in read_lines(run.folder / "samples.jsonl")] == [1] * 16 + [2] * 16


@pytest.mark.fault("14")
def test_a_run_whose_server_says_nothing_ends_with_6_and_trains_on_no_half_of_a_batch(
    llama: Inputs, tmp_path: Path
) -> None:
    # Sound are the answers to the trial before the run, at the first evaluation, and half of those in the first step.
    with serving(GOOD, GOOD, GOOD, hangs) as turning:
        sizes = ("--set", "remote.batch_size=8", "--set", "remote.concurrency=1")
        settings = (*sizes, "--set", f"timeouts.oracle_s={HANG_S}")
        run = train_remote(llama, tmp_path / "bad", "--oracle-url", turning.url, *settings)
        took = Stopwatch(turning.requests[3][3]).within(HANG_S + SOON_S, "the server hangs, to the end")
    assert_ended_by(turning, run, "gave no answer within")
    assert len(turning.requests) == 4
    assert took > HANG_S / 2
    assert [record["step"] for record in run.records("eval")] == [0]
    assert run.records("step") == []
    assert not (run.folder / "samples.jsonl").exists() or not (run.folder / "samples.jsonl").read_text()


def assert_ended_by(server: Server, run: Run, words: str) -> None:
    assert run.exit_code == 6, run.output
    last = run.output.strip().splitlines()[-1]
    assert f"the oracle server at {server.url}/get_feedback {words}" in last
    assert str(run.folder / "logs" / "actor-0.log") in last and "oatlite train --config" in last
    assert "Traceback" not in run.output
    assert within(SOON_S, lambda: not leftovers(run.folder)), leftovers(run.folder)

"""``oatlite serve-oracle`` as a process: what it answers, what it survives, how it ends, and a run against it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgpack
import numpy as np
import pytest
from oatlite_cli.main import main
from oats_feedback import old_preference_body, preference_body, read_scores, read_win_probs, reward_body
from runs import ENVIRONMENT, Inputs, read_lines
from served import END_S, SOON_S, START_S, Served, ended, oracle_server, train_remote, within
from sockets import beyond_this_machine, bound_by, sockets_of

from oatlite.config.schema import RemoteConfig
from oatlite.errors import OracleError
from oatlite.oracles.remote import RemoteOracle
from oatlite.oracles.reward_model import RewardModelOracle

TOKEN = "only-for-this-test"
PROMPTS = [f"Say number {i}: " for i in range(24)]
FIRST, SECOND = [f" it is {i}" for i in range(24)], [" none" * (1 + i % 5) for i in range(24)]


@pytest.fixture(scope="module")
def served(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server") / "two"
    with oracle_server(folder, llama.reward_model, "--workers", "2", "--max-request-mib", "1", token=TOKEN) as found:
        yield found


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", TOKEN)
    monkeypatch.setitem(ENVIRONMENT, "OATLITE_ORACLE_TOKEN", TOKEN)


def remote(served: Served, **changes: int) -> RemoteOracle:
    return RemoteOracle(RemoteConfig(url=served.url, **changes), deadline_s=30)


def with_token(body: bytes) -> bytes:
    return msgpack.packb(msgpack.unpackb(body) | {"token": TOKEN})


def test_one_line_says_that_it_serves(served: Served, llama: Inputs) -> None:
    assert served.line == f"serving {llama.reward_model} at {served.url}/get_feedback with 2 workers"
    assert served.errors.read_text() == ""


def test_it_listens_to_this_machine_alone(served: Served) -> None:
    bound = bound_by(sockets_of([Path(f"/proc/{pid}") for pid in served.pids()]))
    assert ("tcp", "127.0.0.1") in bound
    assert beyond_this_machine(bound) == set()


@pytest.mark.usefixtures("token")
def test_it_answers_as_the_model_does_in_process(served: Served, llama: Inputs) -> None:
    second = [*SECOND[:-1], "far too long " * 40]
    here = RewardModelOracle(str(llama.reward_model)).compare(PROMPTS, FIRST, second)
    oracle = remote(served, batch_size=5)
    there = oracle.compare(PROMPTS, FIRST, second)
    assert there.is_valid.tolist() == here.is_valid.tolist() == [True] * 23 + [False]
    assert there.first_scores is not None and there.second_scores is not None
    np.testing.assert_allclose(there.first_win[:-1], here.first_win[:-1], atol=1e-5)
    np.testing.assert_allclose(there.first_scores, here.first_scores, atol=1e-5)
    np.testing.assert_allclose(there.second_scores, here.second_scores, atol=1e-5)
    assert oracle.num_failures == 0
    oracle.close()


def test_requests_that_come_together_are_answered_as_one_batch(served: Served) -> None:
    def batches() -> tuple[float, float]:
        """How many batches of more than one the workers have had, and of how many requests."""
        text = httpx.get(f"{served.url}/metrics", timeout=60).text
        found = [
            re.findall(rf"^oatlite_oracle\w*batch_size_{what}{{[^}}]*}} (\S+)$", text, re.M)
            for what in ("count", "sum")
        ]
        return tuple(sum(map(float, values)) for values in found)  # type: ignore[return-value]

    body, before = with_token(preference_body(PROMPTS, FIRST, SECOND)), batches()

    def post(_: int) -> int:
        return httpx.post(f"{served.url}/get_feedback", content=body, timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(post, range(64))) == [200] * 64
    num_batches, num_requests = (after - earlier for after, earlier in zip(batches(), before, strict=True))
    assert num_requests > num_batches > 0


@pytest.mark.usefixtures("token")
def test_it_labels_pairs_as_the_model_does_in_process(served: Served, llama: Inputs, tmp_path: Path) -> None:
    rows = [
        dict(zip(("prompt", "response_a", "response_b"), row, strict=True))
        for row in zip(PROMPTS, FIRST, SECOND, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for oracle in (["remote", "--oracle-url", served.url], [str(llama.reward_model)]):
        output = tmp_path / f"{len(made)}.jsonl"
        assert (
            main(["label", "--data", str(tmp_path / "pairs.jsonl"), "--output", str(output), "--oracle", *oracle]) == 0
        )
        made.append(read_lines(output))
    assert len(made[0]) == len(made[1]) > 0
    for there, here in zip(*made, strict=True):
        assert (there["chosen"], there["rejected"]) == (here["chosen"], here["rejected"])
        assert there["margin"] == pytest.approx(here["margin"], abs=1e-4)


def test_it_answers_oats_clients(served: Served, llama: Inputs) -> None:
    here = RewardModelOracle(str(llama.reward_model))
    verdicts = here.compare(PROMPTS, FIRST, SECOND)
    for path, body in (("/get_feedback", preference_body), ("/compare", old_preference_body)):
        answer = httpx.post(served.url + path, content=with_token(body(PROMPTS, FIRST, SECOND)), timeout=60)
        assert answer.status_code == 200
        np.testing.assert_allclose(read_win_probs(answer.content), verdicts.first_win, atol=1e-5)
    answer = httpx.post(f"{served.url}/get_feedback", content=with_token(reward_body(PROMPTS, FIRST)), timeout=60)
    np.testing.assert_allclose(read_scores(answer.content), here.score(PROMPTS, FIRST), atol=1e-5)


@pytest.mark.usefixtures("token")
def test_bad_requests_are_refused_and_harm_nobody(served: Served) -> None:
    url, before = f"{served.url}/get_feedback", served.pids()
    good = with_token(preference_body(PROMPTS[:2], FIRST[:2], SECOND[:2]))
    expected = read_win_probs(httpx.post(url, content=good, timeout=60).content)
    refused = {
        b"\xc1": 422,
        b"<html>": 422,
        b"\x91" * 100_000: 422,
        with_token(preference_body(["p"], [], [])): 422,
        preference_body(["p"], ["a"], ["b"]): 400,
        msgpack.packb(msgpack.unpackb(good) | {"token": "wrong"}): 400,
        good + b"\x00" * (1 << 20): 413,
    }

    def post(body: bytes) -> httpx.Response:
        return httpx.post(url, content=body, timeout=60)

    bodies = [body for wrong in refused for body in (wrong, good)] * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == refused.get(body, 200), answer.text
        assert TOKEN not in answer.text
        if body == good:
            np.testing.assert_allclose(read_win_probs(answer.content), expected, atol=1e-5)
    assert served.pids() == before
    counted = httpx.get(f"{served.url}/metrics", timeout=60).text
    assert re.search(r'oatlite_oracle_throughput_total\{code="422",endpoint="/get_feedback"\} \d', counted)
    assert TOKEN not in served.errors.read_text()


def test_a_client_without_the_token_ends_with_the_reason(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", "another")
    oracle = remote(served)
    with pytest.raises(OracleError, match="answers 400 bad request: the token is missing or wrong") as error:
        oracle.compare(PROMPTS, FIRST, SECOND)
    assert served.url in str(error.value) and "another" not in str(error.value)
    oracle.close()


def test_the_token_is_on_no_command_line_and_in_no_file(served: Served) -> None:
    for pid in served.pids():
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    files = [path for path in served.temporary.rglob("*") if path.is_file()]
    assert files and not any(TOKEN.encode() in path.read_bytes() for path in files)


@pytest.mark.usefixtures("token")
def test_a_run_against_it(served: Served, llama: Inputs, tmp_path: Path) -> None:
    more = ("--oracle-url", served.url, "--max-prompts", "32", "--eval-prompts", "4")
    run = train_remote(llama, tmp_path / "remote", *more)
    assert run.exit_code == 0, run.output
    assert [record["step"] for record in run.records("step")] == [1, 2]
    assert all(record["trained_pairs"] > 0 for record in run.records("step"))
    rows = read_lines(run.folder / "samples.jsonl")
    texts = [[row[name] for row in rows] for name in ("prompt", "chosen", "rejected")]
    here = RewardModelOracle(str(llama.reward_model)).compare(*texts)
    np.testing.assert_allclose([row["win_probability"] for row in rows], here.first_win, atol=1e-5)
    logs = [path.read_text(errors="replace") for path in run.folder.rglob("*") if path.suffix in (".log", ".toml")]
    assert logs and not any(TOKEN in text for text in [*logs, run.output])


SLOW = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def score(response):
    if response == "slow":
        (HERE / "begun").touch()
        while not (HERE / "go-on").exists():
            time.sleep(0.01)
    return 1.0
"""


def test_sigterm_lets_requests_end_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with oracle_server(tmp_path / "one", f"{tmp_path / 'slow.py'}:score") as served, ThreadPoolExecutor(1) as pool:
        pids = served.pids()
        assert len(pids) >= 5 and served.semaphores()
        body = reward_body(["p"], ["slow"])
        answer = pool.submit(httpx.post, f"{served.url}/get_feedback", content=body, timeout=60)
        assert within(SOON_S, (tmp_path / "begun").exists)
        served.process.send_signal(signal.SIGTERM)
        # It refuses what comes now, so it has been told to stop.
        assert within(SOON_S, lambda: httpx.get(served.url, timeout=60).status_code == 503)
        (tmp_path / "go-on").touch()
        assert answer.result().status_code == 200
        assert served.process.wait(END_S) == 143
        assert within(SOON_S, lambda: ended(pids))
        assert list(served.temporary.iterdir()) == []
        assert not served.semaphores()
        with pytest.raises(httpx.ConnectError):
            httpx.get(served.url)
        assert served.errors.read_text() == ""


def test_ctrl_c_while_it_loads(llama: Inputs, tmp_path: Path) -> None:
    with oracle_server(tmp_path / "one", llama.reward_model, wait=False) as served:
        assert within(START_S, lambda: bool(list(served.temporary.glob("oatlite-*/mosec"))))
        pids = served.pids()
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(END_S) == 130
        assert within(SOON_S, lambda: ended(pids))
        assert list(served.temporary.iterdir()) == []


def test_what_cannot_be_served_is_one_line(llama: Inputs, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with oracle_server(tmp_path / "one", broken, "--workers", "2", wait=False) as served:
        assert served.process.wait(START_S) == 2
        said = served.errors.read_text()
        assert said.startswith("oatlite: error: ") and said.count("\n") == 1
        assert f"{broken} is LlamaForCausalLM: it has no classification head" in said
        assert list(served.temporary.iterdir()) == []


def test_a_killed_server_leaves_nothing(served: Served) -> None:  # the last one that needs it
    pids = served.pids()
    assert served.semaphores() and list(served.temporary.iterdir())
    served.process.kill()
    assert within(SOON_S, lambda: ended(pids - {served.process.pid}))
    assert within(SOON_S, lambda: not list(served.temporary.iterdir()) and not served.semaphores())

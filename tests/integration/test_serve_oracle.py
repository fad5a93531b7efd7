"""``oatlite serve-oracle`` as a process: what it answers, what it survives, how it ends, and a run against it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import msgpack
import numpy as np
import pytest
from misbehaving import hangs, sends, serving
from oats_feedback import old_preference_body, preference_body, read_scores, read_win_probs, reward_body
from runs import ENVIRONMENT, OATLITE, Inputs, Run, leftovers, reserved_port, train

from oatlite.config.schema import RemoteConfig
from oatlite.errors import OracleError
from oatlite.oracles.calls import MAX_BAD_ANSWERS
from oatlite.oracles.remote import RemoteOracle
from oatlite.oracles.reward_model import RewardModelOracle

pytestmark = pytest.mark.slow

TOKEN = "only-for-this-test"
START_S, END_S, SOON_S = 240.0, 60.0, 30.0
PROMPTS = [f"Say number {i}: " for i in range(24)]
FIRST, SECOND = [f" it is {i}" for i in range(24)], [" none" * (1 + i % 5) for i in range(24)]


@dataclass(frozen=True, slots=True)
class Served:
    process: subprocess.Popen[str]
    url: str
    line: str
    temporary: Path
    errors: Path
    run_id: str = ""

    def semaphores(self) -> set[Path]:
        """Those named after it."""
        assert self.run_id
        return set(Path("/dev/shm").glob(f"sem.oatlite-{self.run_id}-*"))

    def pids(self) -> set[int]:
        """Of the process and all that it started, and they in turn."""
        found = {self.process.pid}
        parents = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found


def ended(pids: set[int]) -> bool:
    """Where nobody collects orphans, what has ended stays as a zombie."""
    states = []
    for pid in pids:
        with contextlib.suppress(OSError):
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"Z"}


@contextlib.contextmanager
def server(folder: Path, model: object, *more: str, token: str = "", wait: bool = True) -> Iterator[Served]:
    with reserved_port() as port:
        yield from serving_at(port, folder, model, *more, token=token, wait=wait)


def serving_at(port: int, folder: Path, model: object, *more: str, token: str, wait: bool) -> Iterator[Served]:
    folder.mkdir()
    # Sockets go elsewhere where the default folder for temporary files has a long name.
    temporary, errors = Path(tempfile.mkdtemp(prefix="os-")), folder / "errors"
    environment = ENVIRONMENT | {"TMPDIR": str(temporary), "OATLITE_ORACLE_TOKEN": token}
    command = [str(OATLITE), "serve-oracle", "--model", str(model), "--devices", "cpu", "--port", str(port), *more]
    with errors.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
    served = Served(process, f"http://127.0.0.1:{port}", "", temporary, errors)
    pids = {process.pid}
    try:
        if wait:
            assert process.stdout is not None
            watchdog = threading.Timer(START_S, process.kill)
            watchdog.start()
            line = process.stdout.readline()
            watchdog.cancel()
            assert line, errors.read_text()
            (private,) = temporary.glob("oatlite-*")
            served = replace(served, line=line.rstrip("\n"), run_id=private.name.removeprefix("oatlite-"))
            pids = served.pids()
        yield served
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(END_S)
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(temporary)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def served(llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server") / "two"
    with server(folder, llama.reward_model, "--workers", "2", "--max-request-mib", "1", token=TOKEN) as found:
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
    texts = [path.read_text(errors="replace") for path in run.folder.rglob("*") if path.suffix in (".log", ".toml")]
    assert texts and not any(TOKEN in text for text in [*texts, run.output])


def train_remote(llama: Inputs, folder: Path, *more: str) -> Run:
    """As :func:`runs.train`, with the remote oracle in place of the reward model."""
    return train(Inputs(llama.policy, Path("remote"), llama.prompts, llama.preferences), folder, *more)


@pytest.mark.fault("14")
@pytest.mark.parametrize(
    ("turn", "words"), [("nan", "gives an answer that cannot be used"), ("silent", "gave no answer within")]
)
def test_a_run_whose_server_turns_bad_ends_with_6_and_trains_on_none_of_it(
    turn: str, words: str, llama: Inputs, tmp_path: Path
) -> None:
    def win_probs(body: bytes) -> list[float]:
        return [float(len(first) > len(second)) for first, second in msgpack.unpackb(body)["batch_candidates"]]

    good = sends(lambda body: msgpack.packb({"batch_score": [], "batch_first_win_prob": win_probs(body)}))
    bad = sends(lambda body: msgpack.packb({"batch_first_win_prob": [*win_probs(body)[:-1], float("nan")]}))
    # Sound are the answers to the trial before the run, at the first evaluation, and half of those in the first step.
    with serving(*[good] * 3, bad if turn == "nan" else hangs) as turning:
        deadline = f"timeouts.oracle_s={20 if turn == 'nan' else 10}"
        settings = ("--set", "remote.batch_size=8", "--set", deadline, "--set", "remote.concurrency=1")
        run = train_remote(llama, tmp_path / "bad", "--oracle-url", turning.url, *settings)
    assert run.exit_code == 6, run.output
    last = run.output.strip().splitlines()[-1]
    assert f"the oracle server at {turning.url}/get_feedback {words}" in last
    assert len(turning.requests) == 3 + (MAX_BAD_ANSWERS if turn == "nan" else 1)
    assert [record["step"] for record in run.records("eval")] == [0]
    assert run.records("step") == []
    assert not (run.folder / "samples.jsonl").exists() or not (run.folder / "samples.jsonl").read_text()
    assert within(SOON_S, lambda: not leftovers(run.folder)), leftovers(run.folder)


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
    with server(tmp_path / "one", f"{tmp_path / 'slow.py'}:score") as served, ThreadPoolExecutor(1) as pool:
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
    with server(tmp_path / "one", llama.reward_model, wait=False) as served:
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
    with server(tmp_path / "one", broken, "--workers", "2", wait=False) as served:
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

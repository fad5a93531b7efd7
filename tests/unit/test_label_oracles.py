"""``oatlite label`` with oracles that answer over a network, or wrongly, and with a reward model for chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_judge_server
import misbehaving
import pytest
from fake_judge_server import completion, error, verdict
from misbehaving import sends
from oatlite_cli.main import main
from small_folders import byte_tokenizer, save_model

PAIRS = [("aaaa", "b"), ("a", "bbb"), ("aa", "b"), ("a", "bbbbb")]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("oatlite.oracles.judge._SAID", set())
    monkeypatch.setattr("oatlite.oracles.calls.FIRST_PAUSE_S", 0.01)
    rows = [{"prompt": f"p{n}", "response_a": first, "response_b": second} for n, (first, second) in enumerate(PAIRS)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def label(*more: str) -> int:
    return main(["label", "--data", "pairs.jsonl", "--output", "out.jsonl", *more])


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_a_template_that_is_there_and_not_used_is_told_of_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Path("chatty"), reward=True, tokenizer=byte_tokenizer(chat=True))
    told = "the reward model chatty has a chat template, and reads plain text"
    assert label("--oracle", "chatty") == 0
    captured = capsys.readouterr()
    assert captured.err.count(told) == 1 and told not in captured.out
    for choice in ("true", "false"):
        assert label("--oracle", "chatty", "--overwrite", "--set", f"oracle.chat_template={choice}") == 0
        assert told not in "".join(capsys.readouterr())


# Servers that are none


@pytest.mark.parametrize(
    ("answer", "num_requests", "words"),
    [
        (sends(b"<!doctype html><title>Welcome</title>", Content_Type="text/html"), 3, "cannot be used: it is not msg"),
        (sends(b"not here", 404), 1, "answers 404 not here"),
    ],
)
def test_a_url_of_something_else_is_one_line_with_the_url(
    answer: Callable[[Any], None], num_requests: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with misbehaving.serving(answer) as server:
        assert label("--oracle", "remote", "--oracle-url", server.url) == 6
        assert len(server.requests) == num_requests
    assert_one_line(capsys, f"the oracle server at {server.url}/get_feedback ", words)


def test_a_judge_that_refuses_the_key_at_the_start_is_one_line_with_the_url(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-77")
    with fake_judge_server.serving(lambda body: error(401, "Incorrect API key provided: sk-canary-77")) as server:
        assert label("--oracle", "judge", "--judge-model", "tiny", "--judge-url", server.url) == 6
        assert len(server.asked) == 1
    assert_one_line(capsys, f"the judge tiny at {server.url}/chat/completions refuses us with 401")


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("oatlite: error: ") and all(word in captured.err for word in words), captured.err
    assert "sk-canary" not in captured.err and not Path("out.jsonl").exists()


# A judge


@pytest.fixture
def template() -> str:
    """A file of a person's own, by which the questions below are told apart."""
    Path("mine.txt").write_text("Task: {prompt}\nA: {first}\nB: {second}\nA or B?")
    return "mine.txt"


@pytest.fixture
def longer(template: str) -> Iterator[fake_judge_server.FakeJudgeServer]:
    """A judge that is sure of the longer answer, and gives no log-probabilities."""

    def answer(body: dict[str, Any]) -> fake_judge_server.Reply:
        first, second = shown(body["messages"][0]["content"])
        return completion("A" if len(first) > len(second) else "B")

    with fake_judge_server.serving(answer) as server:
        yield server


def shown(question: str) -> tuple[str, str]:
    """The answers of a question in that template's shape, as they stand."""
    lines = question.splitlines()
    assert lines[0].startswith("Task: p") and lines[3] == "A or B?"
    return lines[1].removeprefix("A: "), lines[2].removeprefix("B: ")


def judge(server: fake_judge_server.FakeJudgeServer, *more: str) -> int:
    sets = [word for setting in more for word in ("--set", setting)]
    return label("--oracle", "judge", "--judge-model", "tiny", "--judge-url", server.url, *sets)


def test_a_judge_without_log_probabilities_is_taken_at_its_word_which_is_said_once(
    longer: fake_judge_server.FakeJudgeServer, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert judge(longer, f"judge.template={template}") == 0
    assert [row["chosen"] for row in read()] == [max(pair, key=len) for pair in PAIRS]
    assert {row["win_probability"] for row in read()} == {1.0}
    [said] = caplog.messages
    assert said == (
        "the judge tiny gives no log-probabilities; its verdicts are read from what it writes, and count as certain"
    )


def test_a_template_of_ones_own_is_what_the_judge_reads_in_both_orders(
    longer: fake_judge_server.FakeJudgeServer, template: str
) -> None:
    assert judge(longer, f"judge.template={template}") == 0
    asked = [shown(question) for question in longer.questions()[2:]]  # after the pair that is tried first
    assert sorted(asked) == sorted([*PAIRS, *((second, first) for first, second in PAIRS)])


def test_one_order_at_random_is_half_the_questions_and_the_seed_decides(template: str) -> None:
    with fake_judge_server.serving(lambda body: verdict(0.75)) as server:  # the first that is shown, whichever

        def found(seed: int) -> list[tuple[str, str]]:
            del server.asked[:]
            settings = (f"judge.template={template}", "judge.order=random", f"run.seed={seed}")
            assert judge(server, *settings) == 0
            assert {row["win_probability"] for row in read()} == {0.75}
            asked = [shown(question) for question in server.questions()[1:]]
            assert sorted(asked) == sorted((row["chosen"], row["rejected"]) for row in read())
            Path("out.jsonl").unlink()
            return sorted(asked)

        several = [found(seed) for seed in range(4)]
        assert several[0] == found(0)
    assert all(len(asked) == len(PAIRS) for asked in several)
    assert len(set(map(tuple, several))) > 1

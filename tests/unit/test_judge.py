"""The judge: probabilities out of log-probabilities, orders, keys, refusals, and answers that make no sense."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_judge_server import FakeJudgeServer, as_json, completion, error, serving, token, verdict

from oatlite.config.schema import JudgeConfig
from oatlite.errors import ConfigError, OracleError
from oatlite.oracles import checked
from oatlite.oracles.judge import JudgeOracle
from oatlite.oracles.judge_prompts import EMPTY, fill, load_template, template_names
from oatlite.oracles.judge_verdicts import TooLong, read_refusal

CANARY = "sk-canary-5f3a91c2d7"
PAIR = (["Name a colour."], ["red"], ["a spoon"])


@pytest.fixture
def fake() -> Iterator[FakeJudgeServer]:
    """Finds the first answer better with 3/4, whatever it is."""
    with serving(lambda body: verdict(0.75)) as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports come again, and with them addresses that something was said of."""
    monkeypatch.setattr("oatlite.oracles.judge._SAID", set())


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oatlite.oracles.calls.FIRST_PAUSE_S", 0.01)


def judge_at(fake: FakeJudgeServer | str, *, seed: int = 0, deadline_s: float = 20, **options: Any) -> JudgeOracle:
    url = fake if isinstance(fake, str) else fake.url
    return JudgeOracle(JudgeConfig(model="tiny", url=url, **options), seed=seed, deadline_s=deadline_s)


def shown_first(body: dict[str, Any]) -> str:
    """The answer that a question in the shape of the general template shows first."""
    found = re.search(r"<reply_a>\n(.*)\n</reply_a>", body["messages"][0]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def warnings_of(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and words in r.getMessage()]


# What is asked


def test_the_request_asks_for_one_token_and_the_alternatives_to_it(fake: FakeJudgeServer) -> None:
    judge_at(fake, order="random").compare(*PAIR)
    (body,) = fake.asked
    question = body.pop("messages")
    assert body == {"model": "tiny", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert [message["role"] for message in question] == ["user"]
    assert fake.headers[0]["path"] == "/v1/chat/completions"
    assert fake.headers[0]["accept-encoding"] == "identity"
    assert "authorization" not in fake.headers[0]


def test_the_key_comes_from_the_environment(fake: FakeJudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {CANARY}\n")
    judge_at(fake, key_env="MY_KEY").compare(*PAIR)
    assert fake.headers[0]["authorization"] == f"Bearer {CANARY}"


def test_the_same_question_is_asked_once_and_equal_responses_are_a_draw(fake: FakeJudgeServer) -> None:
    verdicts = judge_at(fake).compare(["p", "p", "p", "q"], ["a", "b", "c", "a"], ["b", "a", "c", "b"])
    assert verdicts.is_valid.all()
    assert verdicts.first_win.tolist() == [0.5] * 4
    questions = fake.questions()
    assert len(questions) == len(set(questions)) == 4, "two orders of each of two distinct pairs"


def test_a_conversation_is_written_out(fake: FakeJudgeServer) -> None:
    turns = [("system", "Be brief."), ("user", "Hi {first}"), ("assistant", "Hello"), ("user", "Bye")]
    prompt = json.dumps([{"role": role, "content": content} for role, content in turns])
    judge_at(fake, template="general").compare([prompt], ["a"], ["b"])
    written = "<request>\nSystem: Be brief.\n\nUser: Hi {first}\n\nAssistant: Hello\n\nUser: Bye\n</request>"
    assert all(written in question for question in fake.questions())
    alone = json.dumps([{"role": "user", "content": "Just this"}])
    assert "<request>\nJust this\n</request>" in fill(load_template("general"), alone, "a", "b")


# What is made of the answer


def test_the_probability_is_the_mass_on_a_over_the_mass_on_both() -> None:
    alternatives = {"A": 0.4, " A": 0.05, "a": 0.05, "B": 0.1, "▁B": 0.1, "The": 0.2, "AB": 0.05, "\n": 0.05}
    with serving(lambda body: completion("A", [token("A", alternatives)])) as fake:
        verdicts = judge_at(fake, order="random").compare(*PAIR)
    is_swapped = "a spoon" in shown_first(fake.asked[0])
    expected = 0.5 / 0.7  # 0.4 + 0.05 + 0.05 against 0.1 + 0.1
    assert verdicts.first_win[0] == pytest.approx(1 - expected if is_swapped else expected, abs=1e-6)
    assert verdicts.first_win.dtype == np.float32
    checked(verdicts, 1)


def test_the_token_that_was_written_counts_where_it_is_not_listed() -> None:
    written = {"token": "B", "logprob": math.log(0.3), "top_logprobs": [{"token": "A", "logprob": math.log(0.6)}]}
    with serving(lambda body: completion("B", [written])) as fake:
        verdicts = judge_at(fake).compare(*PAIR)
        verdicts_of_one = judge_at(fake, order="random").compare(*PAIR)
    assert verdicts.first_win[0] == 0.5
    assert abs(verdicts_of_one.first_win[0] - 0.5) == pytest.approx(0.6 / 0.9 - 0.5, abs=1e-6)


def test_a_mass_of_zero_is_certain() -> None:
    listed = [{"token": "A", "logprob": 0.0}, {"token": "B", "logprob": -9999.0}]
    always = [{"token": "A", "logprob": 0, "top_logprobs": listed}]
    with serving(lambda body: completion("A", always)) as fake:
        assert judge_at(fake, order="random").compare(*PAIR).first_win.tolist() in ([0.0], [1.0])


@pytest.mark.parametrize("bias", [0.1, 0.3, 0.75, 0.9999])
def test_both_orders_cancel_a_position_bias_exactly(bias: float) -> None:
    with serving(lambda body: verdict(bias)) as fake:
        verdicts = judge_at(fake).compare(["p"] * 3, ["a", "b", "c"], ["x", "y", "z"])
    assert verdicts.first_win.tolist() == [0.5] * 3
    assert verdicts.is_valid.all()


def test_both_orders_give_the_mean() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return verdict(0.9 if shown_first(body) == "red" else 0.3)

    with serving(answer) as fake:
        verdicts = judge_at(fake).compare(*PAIR)
        turned = judge_at(fake).compare(PAIR[0], PAIR[2], PAIR[1])
    assert verdicts.first_win[0] == pytest.approx((0.9 + 0.7) / 2, abs=1e-6)
    assert turned.first_win[0] == pytest.approx(0.2, abs=1e-6)


def test_a_random_order_depends_on_the_pair_and_the_seed_alone(fake: FakeJudgeServer) -> None:
    def orders(pairs: list[int], seed: int) -> list[bool]:
        """Whether each pair was turned around, seen in that the first of a question has 3/4."""
        verdicts = judge_at(fake, order="random", seed=seed).compare(
            [f"p{n}" for n in pairs], [f"a{n}" for n in pairs], [f"b{n}" for n in pairs]
        )
        assert set(verdicts.first_win.tolist()) <= {0.25, 0.75}
        return (verdicts.first_win < 0.5).tolist()

    together = orders(list(range(200)), 0)
    assert len(fake.asked) == 200
    assert orders([7], 0) + orders([3, 150], 0) == [together[7], together[3], together[150]]
    assert 72 < sum(together) < 128, "four standard deviations"
    other = orders(list(range(200)), 1)
    assert 72 < sum(a != b for a, b in zip(together, other, strict=True)) < 128


def test_without_log_probabilities_the_word_counts_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return completion("A" if shown_first(body) in ("good", "even") else "B")

    with serving(answer) as fake:
        judge = judge_at(fake)
        verdicts = judge.compare(["p", "p", "p"], ["good", "bad", "even"], ["bad", "good", "good"])
        judge.compare(["q"], ["good"], ["bad"])
        judge_at(fake).compare(["q"], ["good"], ["bad"])  # as the one pair that is tried before a run
    assert verdicts.first_win.tolist() == [1.0, 0.0, 0.5]
    assert verdicts.is_valid.all()
    assert len(warnings_of(caplog, "no log-probabilities")) == 1


@pytest.mark.parametrize("wrote", ["I", "", None, "AB", "C", "Answer"])
def test_a_verdict_that_cannot_be_read_is_not_valid(wrote: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda body: completion(wrote)) as fake:
        judge = judge_at(fake)
        assert not judge.compare(["p"] * 3, ["a", "b", "c"], ["x"] * 3).is_valid.any()
        assert not warnings_of(caplog, "no verdict of the judge tiny"), "three pairs are too few to tell"
        for _ in range(2):
            verdicts = checked(judge.compare(["p"] * 5, list("abcde"), ["x"] * 5), 5)
    assert not verdicts.is_valid.any()
    assert judge.num_failures == 0
    assert len(fake.asked) == 26, "none is asked again"
    (warning,) = warnings_of(caplog, "no verdict of the judge tiny")
    assert repr(wrote or "") in warning and "judge.max_tokens" in warning
    assert len(warnings_of(caplog, "5 of 5 verdicts cannot be read")) == 2


def test_pairs_that_are_too_long_say_nothing_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return error(400, **VLLM_TOO_LONG) if "LENGTHY" in body["messages"][0]["content"] else completion("Hm")

    with serving(answer) as fake:
        judge = judge_at(fake)
        judge.compare(["LENGTHY", *"pqrs"], ["a"] * 5, ["b"] * 5)
    assert warnings_of(caplog, "1 of 5 pairs are too long") and warnings_of(caplog, "4 of 5 verdicts cannot be read")
    (warning,) = warnings_of(caplog, "no verdict of the judge tiny")
    assert "'Hm'" in warning


def test_where_one_order_cannot_be_read_the_pair_is_not_valid() -> None:
    with serving(lambda body: completion("A" if shown_first(body) == "red" else "?")) as fake:
        verdicts = judge_at(fake).compare([*PAIR[0], "p"], [*PAIR[1], "same"], [*PAIR[2], "same"])
    assert verdicts.is_valid.tolist() == [False, True]


def test_little_mass_on_either_answer_is_no_verdict() -> None:
    def judged(mass: float) -> bool:
        with serving(lambda body: completion("I", [token("I", {"I": 0.9, "A": mass})])) as fake:
            return bool(judge_at(fake).compare(*PAIR).is_valid[0])

    assert [judged(0.009), judged(0.011)] == [False, True]


@pytest.mark.parametrize(
    ("wrote", "finish_reason", "verdict_read"),
    [
        ("A good one, and a bad one.\nVerdict: **B**", "stop", "B"),
        ("Both talk of A.\n\nA.\n\n", "stop", "A"),
        ("b", "stop", "B"),
        ("A is better than B", "stop", None),
        ("I prefer the first", "stop", None),
        ("It is a matter of A", "length", None),
        ("", "length", None),
    ],
)
def test_a_judge_that_may_reason_ends_with_its_verdict(
    wrote: str, finish_reason: str, verdict_read: str | None
) -> None:
    with serving(lambda body: completion(wrote, None, finish_reason)) as fake:
        verdicts = judge_at(fake, max_tokens=500, order="random").compare(*PAIR)
    assert fake.asked[0]["max_tokens"] == 500
    assert verdicts.is_valid.tolist() == [verdict_read is not None]
    if verdict_read is not None:
        assert verdicts.first_win[0] == float((verdict_read == "A") == (shown_first(fake.asked[0]) == "red"))


def test_a_verdict_after_reasoning_has_the_probabilities_of_its_own_token() -> None:
    words = ["A", " thought", ".\n", "B", "<end>"]
    masses = [{"A": 0.99, "B": 0.01}, {" thought": 1.0}, {".\n": 1.0}, {"A": 0.2, "B": 0.8}, {"<end>": 1.0}]
    tokens = [token(word, mass) for word, mass in zip(words, masses, strict=True)]
    with serving(lambda body: completion("A thought.\nB", tokens)) as fake:
        verdicts = judge_at(fake, max_tokens=9, order="random").compare(*PAIR)
    assert min(verdicts.first_win[0], 1 - verdicts.first_win[0]) == pytest.approx(0.2, abs=1e-6)


# Servers that refuse, or make no sense


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_at_once_and_is_not_shown(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    with serving(lambda body: error(status, f"Incorrect API key provided: {CANARY}")) as fake:
        judge = judge_at(fake)
        with pytest.raises(OracleError, match=rf"the judge tiny at {fake.url}.* refuses us with {status}") as caught:
            judge.compare(*PAIR)
    assert caught.value.exit_code == 6
    assert len(fake.asked) == 1
    assert fake.headers[0]["authorization"] == f"Bearer {CANARY}"
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(judge) + repr(vars(judge))
    assert CANARY not in shown


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_key_that_an_endpoint_repeats_is_not_shown(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    with (
        serving(lambda body: error(status, f"you sent Bearer {CANARY}", param="temperature")) as fake,
        pytest.raises(OracleError, match=r"you sent Bearer \*\*\*") as caught,
    ):
        judge_at(fake, deadline_s=3).compare(*PAIR)
    assert CANARY not in str(caught.value) + caplog.text
    with serving(lambda body: completion(CANARY)) as fake:
        judge_at(fake).compare(["p"] * 4, list("abcd"), ["x"] * 4)
    assert "it writes '***'" in caplog.text and CANARY not in caplog.text


def test_a_rate_limit_is_waited_for_as_told() -> None:
    replies = iter([as_json(429, {"error": {"message": "slow down"}}, Retry_After="1.2")])
    with serving(lambda body: next(replies, verdict(0.75))) as fake:
        judge = judge_at(fake)
        verdicts = judge.compare(["p"] * 3, ["a", "b", "c"], ["x"] * 3)
    assert verdicts.is_valid.all()
    assert judge.num_failures == 1
    assert fake.times[1] - fake.times[0] >= 1.2
    assert len(fake.asked) == 7


def test_all_questions_of_a_batch_share_one_deadline() -> None:
    def slow(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.7)
        return verdict(0.75)

    with serving(slow) as fake:
        judge = judge_at(fake, deadline_s=1.0)
        with pytest.raises(OracleError, match="within"):  # the first question and the rest have one second together
            judge.compare(["p"], ["a"], ["b"])


def test_an_account_without_money_is_not_waited_for() -> None:
    spent = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
    with serving(lambda body: as_json(429, spent)) as fake, pytest.raises(OracleError, match="429"):
        judge_at(fake).compare(["p"], ["a"], ["b"])
    assert len(fake.asked) == 1


OPENAI_TOO_LONG = {
    "message": "This model's maximum context length is 4097 tokens. However, your messages resulted in 4363 tokens.",
    "param": "messages",
    "code": "context_length_exceeded",
}
VLLM_TOO_LONG = {
    "message": "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input "
    "tokens, which exceeds this limit even without any output tokens. (parameter=input_tokens, value=2049)",
    "param": "input_tokens",
    "code": 400,
}
VLLM_ENGINE_TOO_LONG = {
    "message": "The decoder prompt (length 9) plus the number of requested output tokens (at least 1) is longer than "
    "the maximum model length of 9. Make sure that `max_model_len` is no smaller.",
    "code": 400,
}


@pytest.mark.parametrize("words", [OPENAI_TOO_LONG, VLLM_TOO_LONG, VLLM_ENGINE_TOO_LONG])
def test_a_question_that_is_too_long_is_not_valid_and_counted(
    words: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return error(400, **words) if "LENGTHY" in body["messages"][0]["content"] else verdict(0.75)

    with serving(answer) as fake:
        judge = judge_at(fake, template="general")
        verdicts = judge.compare(["LENGTHY", "p", "LENGTHY", "p"], list("abcd"), ["x"] * 4)
    assert verdicts.is_valid.tolist() == [False, True, False, True]
    assert judge.num_failures == 0 and not warnings_of(caplog, "cannot be read")
    assert warnings_of(caplog, "2 of 4 pairs are too long for the judge")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, {"message": "bad input: 'This model's maximum context length is 5 tokens'"}),
        (400, {"message": "Could not finish: max_tokens is too small", "param": "max_tokens"}),
        (400, {"message": "unknown field", "param": "messages"}),
        (404, {"message": "The model `tiny` does not exist.", "code": "model_not_found"}),
        (422, {"message": "This model's maximum context length is 5 tokens"}),
    ],
)
def test_any_other_refusal_ends_at_once(status: int, words: dict[str, Any]) -> None:
    with serving(lambda body: error(status, **words)) as fake:
        with pytest.raises(OracleError, match=f"{fake.url}/chat/completions answers {status} .*{words['message'][:9]}"):
            judge_at(fake).compare(*PAIR)
        assert len(fake.asked) == 1


@pytest.mark.parametrize("answer", ["", "[]", '{"error": 5}', "null", '"maximum context length is"', "{"])
def test_a_refusal_without_words_means_nothing_more(answer: str) -> None:
    assert read_refusal(400, answer) is None
    flat = json.dumps({"object": "error", **VLLM_TOO_LONG})
    assert read_refusal(400, flat) == TooLong(), "older vLLM has no object around it"


def test_an_endpoint_that_takes_fewer_parameters_is_asked_with_fewer(caplog: pytest.LogCaptureFixture) -> None:
    """As OpenAI's reasoning models do."""

    def answer(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            words = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return error(400, words, param="max_tokens", code="unsupported_parameter")
        if "temperature" in body:
            return error(400, "Only the default (1) value is supported.", param="temperature", code="unsupported_value")
        if "logprobs" in body:
            return error(403, "You are not allowed to request logprobs from this model", param=None, code=None)
        assert body["max_completion_tokens"] == 50 and "top_logprobs" not in body
        return completion("A" if shown_first(body) == "red" else "B")

    with serving(answer) as fake:
        judge = judge_at(fake, max_tokens=50)
        assert judge.compare(*PAIR).first_win.tolist() == [1.0]
        assert len(fake.asked) == 6, "four refusals of one question, and two answers"
        judge.compare(*PAIR)
        assert len(fake.asked) == 8
    assert judge.num_failures == 0
    assert len(warnings_of(caplog, "without max_tokens from now on: Unsupported parameter")) == 1
    assert len(warnings_of(caplog, "without logprobs")) == len(warnings_of(caplog, "without temperature")) == 1
    assert len(warnings_of(caplog, "no log-probabilities")) == 1


def test_an_endpoint_that_lists_few_alternatives_is_asked_for_few(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if body["top_logprobs"] > 8:
            return error(400, "Requested sample logprobs of 20, which is greater than max allowed: 8", param="logprobs")
        return verdict(0.75)

    with serving(answer) as fake:
        assert judge_at(fake, order="random").compare(*PAIR).is_valid.all()
    assert fake.asked[-1]["top_logprobs"] == 5
    assert not caplog.records


HTML = (200, {"Content-Type": "text/html"}, b"<!doctype html><title>Welcome</title>")


@pytest.mark.parametrize(
    "reply",
    [
        HTML,
        as_json(200, []),
        as_json(200, {"choices": []}),
        as_json(200, {"choices": [{"text": "A"}]}),
        as_json(200, {"choices": [{"message": {"content": 5}}]}),
    ],
)
def test_an_address_that_answers_something_else_is_named(reply: Any, short_pauses: None) -> None:
    with serving(lambda body: reply) as fake:
        with pytest.raises(OracleError, match=rf"the judge tiny at {fake.url}.*chat completion.*asked 3 times"):
            judge_at(fake).compare(*PAIR)
        assert len(fake.asked) == 3


@pytest.mark.parametrize("logprob", ["NaN", "5.0", "Infinity", '"-1"', "null", "true"])
def test_forged_log_probabilities_are_refused(logprob: str, short_pauses: None) -> None:
    listed = '{"token": "A", "logprob": %s}' % logprob  # noqa: UP031  # braces
    body = '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "logprob": -1,'
    body += f'"top_logprobs": [{listed}]}}]}}}}]}}'
    with (
        serving(lambda _: (200, {}, body.encode())) as fake,
        pytest.raises(OracleError, match="as the log-probability of a token"),
    ):
        judge_at(fake).compare(*PAIR)


# The template


def test_the_templates_that_come_along_hold_all_places() -> None:
    assert template_names() == ["general", "summaries"]
    assert JudgeConfig().template == "general", "prompts may ask for anything"
    assert load_template("summaries") != load_template("general")
    for name in template_names():
        text = load_template(name)
        assert [text.count(place) for place in ("{prompt}", "{first}", "{second}")] == [1, 1, 1]


def test_a_template_of_ones_own_is_filled_literally(fake: FakeJudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text('{"task": {prompt}} {} {{first}} | {second} | {prompt} | {other} \\1 %s\n')
    judge_at(fake, template=str(file)).compare(["{second} \\g<0>"], ["{prompt}{first}{x}"], ["{0} {"])
    one, other = "{prompt}{first}{x}", "{0} {"
    expected = '{"task": {second} \\g<0>} {} {%s} | %s | {second} \\g<0> | {other} \\1 %%s'
    assert fake.questions() == [expected % (one, other), expected % (other, one)]


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_response_is_shown_as_one(fake: FakeJudgeServer, empty: str) -> None:
    assert judge_at(fake).compare(["p"], [empty], ["x"]).is_valid.all()
    assert [shown_first(body) for body in fake.asked] == [EMPTY, "x"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{prompt} and {first}", r"lacks \{second\}; write"),
        (b"{first}", r"lacks \{prompt\} and \{second\}; "),
        (b"\xff\xfe{prompt}", "no UTF-8 text"),
        (None, "No such file or directory; give general, summaries or a text file"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        judge_at("http://127.0.0.1:9/v1", template=str(file))


# What is missing


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("https://api.example.com/v1", {}, "api.example.com wants a key, .* OPENAI_API_KEY is not set; export OPENAI"),
        ("https://api.example.com/v1", {"key_env": "MY_KEY"}, "MY_KEY is not set"),
        ("http://10.0.0.1:8000/v1", {}, "10.0.0.1 wants a key"),
    ],
)
def test_what_is_missing_is_told_at_once(url: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        judge_at(url, **options)


@pytest.mark.parametrize("url", ["http://localhost:9/v1", "http://127.8.0.1:9/v1/", "http://[::1]:9/v1"])
def test_on_this_machine_no_key_is_needed(url: str) -> None:
    judge_at(url).close()


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\nX: y")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY has characters that no key has") as caught:
        judge_at("https://api.example.com/v1")
    assert CANARY not in str(caught.value)

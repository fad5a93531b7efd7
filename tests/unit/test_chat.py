"""A conversation: what the model sees of it, what is forgotten, and what is written where."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from small_folders import byte_tokenizer

from oatlite.errors import ConfigError
from oatlite.inference.chat import Conversation, Talk
from oatlite.sampling import SamplingOptions

SAMPLING = SamplingOptions(temperature=0.7, max_new_tokens=20)


class FakeEngine:
    """Answers with what it was told to, in pieces, and notes what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.num_closed = 0

    def stream(self, prompt: np.ndarray, seed: int, sampling: SamplingOptions) -> Iterator[str]:
        self.asked.append({"prompt": bytes_of(prompt), "seed": seed, **asdict(sampling)})
        try:
            yield from self._answers.pop(0)
        finally:
            self.num_closed += 1


def bytes_of(tokens: np.ndarray) -> str:
    return byte_tokenizer(bos=True).decode(tokens.tolist())


def talk(engine: FakeEngine, context: int = 200, *, chat: bool = True, system: str | None = None) -> Talk:
    conversation = Conversation(byte_tokenizer(chat=chat, bos=chat), context, 20, system)
    return Talk(engine, conversation, SAMPLING, seed=1)


def through_pipe(talk: Talk, *lines: str) -> str:
    out = io.StringIO()
    talk.through_pipe([f"{line}\n" for line in lines], out)
    return out.getvalue()


def test_turns_go_through_the_chat_template() -> None:
    engine = FakeEngine(["Hel", "lo"], ["yes"])
    assert through_pipe(talk(engine, system="be kind"), "hi", "sure?") == "Hello\nyes\n"
    assert [ask["prompt"] for ask in engine.asked] == [
        "<bos><system>be kind<user>hi<assistant>",
        "<bos><system>be kind<user>hi<assistant>Hello<user>sure?<assistant>",
    ]
    assert engine.asked[0]["seed"] != engine.asked[1]["seed"]
    assert engine.asked[0]["temperature"] == 0.7 and engine.asked[0]["max_new_tokens"] == 20


def test_without_a_template_the_text_goes_on() -> None:
    engine = FakeEngine([" b"], [" d"])
    through_pipe(talk(engine, chat=False), "a", "c")
    assert [ask["prompt"] for ask in engine.asked] == ["a", "a b\nc"]


def test_commands_and_empty_lines_get_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(["1"], ["2"])
    assert through_pipe(talk(engine), "a", "", "/reset", "b", "/exit", "c") == "1\n2\n"
    assert engine.asked[1]["prompt"] == "<bos><user>b<assistant>"
    assert capsys.readouterr() == ("", "the conversation starts anew\n")


def test_an_answer_is_one_line() -> None:
    assert through_pipe(talk(FakeEngine(["one\ntw", "o\r\nthree\n"], [])), "a", "b") == "one\\ntwo\\nthree\\n\n\n"


def test_the_oldest_turns_are_forgotten_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(*[["y" * 20]] * 4)
    through_pipe(talk(engine, context=100, system="s"), "first", "second", "third", "x" * 30)
    prompts = [ask["prompt"] for ask in engine.asked]
    assert "first" in prompts[1] and "first" not in prompts[2] and "second" in prompts[2]
    assert "second" not in prompts[3] and all(prompt.startswith("<bos><system>s") for prompt in prompts)
    assert all(
        len(prompt) - 4 + ask["max_new_tokens"] <= 100 for prompt, ask in zip(prompts, engine.asked, strict=True)
    )
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "the conversation has outgrown the model: the oldest turn is forgotten"


def test_a_line_that_is_too_long_is_told_and_the_next_one_answered(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(["yes"])
    assert through_pipe(talk(engine, context=60), "x" * 60, "y") == "\nyes\n"
    assert "and the model takes 60 with its answer; shorten it" in capsys.readouterr().err
    assert "x" not in engine.asked[0]["prompt"].replace("<", "")
    conversation = Conversation(byte_tokenizer(), 10, 20)
    assert conversation.ask("x" * 9).max_new_tokens == 1
    with pytest.raises(ConfigError, match="10 tokens"):
        conversation.ask("x" * 10)


def test_a_stop_keeps_what_was_said_and_gives_the_request_up() -> None:
    engine = FakeEngine(["on", "e ", "two", " three"], ["next"])
    told: list[str] = []
    one = talk(engine)
    for piece in one.answer("count", lambda: len(told) >= 2):
        told.append(piece)
    assert told == ["on", "e "] and engine.num_closed == 1
    assert list(one.answer("more", lambda: False)) == ["next"]
    assert "<assistant>one <user>more" in engine.asked[1]["prompt"]

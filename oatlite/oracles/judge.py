"""A language model as the oracle: it reads the prompt and both responses, and says which is better.

It stands behind any OpenAI-compatible endpoint: OpenAI's own, vLLM's server, ... A judge prefers what stands first,
or last; asked in both orders its bias cancels, at twice the price.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import httpx
import numpy as np

from oatlite.config.schema import JudgeConfig
from oatlite.errors import ConfigError, OracleError
from oatlite.oracles.base import PreferenceOracle, Verdicts
from oatlite.oracles.calls import Caller, is_on_this_machine
from oatlite.oracles.judge_prompts import fill, load_template
from oatlite.oracles.judge_verdicts import Reading, TooLong, Unsupported, read_answer, read_refusal

log = logging.getLogger(__name__)

TOP_LOGPROBS, FEW_LOGPROBS = 20, 5
"""Alternatives asked for: as many as OpenAI gives, and vLLM unless told otherwise; then as some endpoints allow."""
ENOUGH_PAIRS = 4
"""If of so many no verdict can be read, something is wrong with the judge and not with a pair."""
_SAID: set[tuple[str, str]] = set()
"""What was said of a judge, by its address: once in a process, however many oracles ask there."""


class JudgeOracle(PreferenceOracle):
    """Asks the model of ``options`` "A or B?" and takes the probabilities of its verdict's token.

    ``seed`` draws the orders of ``order = "random"``, of each pair by its texts. ``deadline_s`` bounds the requests of
    one batch. Two equal responses are a draw, about which nobody is asked.

    Raises ConfigError when the template cannot be used, or the key is missing.
    """

    def __init__(self, options: JudgeConfig, *, seed: int, deadline_s: float) -> None:
        assert options.model is not None, "check_oracles sees to it"
        self._options = options
        self._seed = seed
        self._deadline_s = deadline_s
        self._template = load_template(options.template)
        self._parameters: dict[str, Any] = {
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }
        self._is_understood = False
        endpoint = httpx.URL(options.url.rstrip("/") + "/chat/completions")
        key = _key(options.key_env, endpoint)
        self._caller = Caller(
            str(endpoint),
            what=f"the judge {options.model}",
            concurrency=options.concurrency,
            timeout_s=options.timeout_s,
            deadline_s=deadline_s,
            max_answer_bytes=2**20 + 2**13 * options.max_tokens,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            secrets=[key],
        )

    @property
    def num_failures(self) -> int:
        return self._caller.num_failures

    def close(self) -> None:
        self._caller.close()

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`; a question that comes twice in a batch is asked once."""
        del references  # the judge reads the two responses alone
        asked = [self._questions(*pair) for pair in zip(prompts, first, second, strict=True)]
        answers = self._ask(dict.fromkeys(question for questions in asked for question, _ in questions))
        first_win = np.full(len(asked), 0.5, np.float32)
        is_valid = np.ones(len(asked), np.bool_)
        for b, questions in enumerate(asked):
            leanings = [_leaning(answers[question], is_swapped=is_swapped) for question, is_swapped in questions]
            is_valid[b] = None not in leanings
            if leanings and is_valid[b]:
                first_win[b] = 0.5 + sum(leaning for leaning in leanings if leaning is not None) / len(leanings)
        self._report([[answers[question] for question, _ in questions] for questions in asked if questions])
        return Verdicts(first_win=first_win, is_valid=is_valid)

    def _questions(self, prompt: str, first: str, second: str) -> list[tuple[str, bool]]:
        """What to ask about a pair, and whether that shows the second response first."""
        if first == second:
            return []
        if self._options.order == "both":
            orders = [False, True]
        else:
            texts = json.dumps([self._seed, prompt, first, second]).encode()
            orders = [bool(hashlib.blake2b(texts, digest_size=1).digest()[0] & 1)]
        return [
            (fill(self._template, prompt, *((second, first) if is_swapped else (first, second))), is_swapped)
            for is_swapped in orders
        ]

    def _ask(self, questions: Iterable[str]) -> dict[str, Reading | TooLong]:
        """The first is asked alone, until it shows which parameters the endpoint takes."""
        left, deadline = list(questions), time.monotonic() + self._deadline_s
        answers: dict[str, Reading | TooLong] = {}
        while left:
            batch = left if self._is_understood else left[:1]
            found = self._caller.ask_all(
                [self._body(question) for question in batch], self._read, read_refusal, deadline
            )
            for refusal in {answer.parameter: answer for answer in found if isinstance(answer, Unsupported)}.values():
                self._do_without(refusal)
            for question, answer in zip(batch, found, strict=True):
                if not isinstance(answer, Unsupported):
                    answers[question] = answer
                    self._is_understood = True
            left = [question for question in left if question not in answers]
        return answers

    def _body(self, question: str) -> bytes:
        messages = [{"role": "user", "content": question}]
        return json.dumps({"model": self._options.model, "messages": messages, **self._parameters}).encode()

    def _read(self, index: int, answer: bytes) -> Reading | TooLong | Unsupported:
        del index
        return read_answer(answer, self._options.max_tokens)

    def _do_without(self, refusal: Unsupported) -> None:
        """Change the parameters for an endpoint that does not take one of them."""
        words = self._caller.without_secrets(refusal.words)[:200]
        if refusal.parameter not in self._parameters:
            raise OracleError(f"{self._caller.what} at {self._caller.url} answers {words}")
        if refusal.parameter == "logprobs" and self._parameters["top_logprobs"] > FEW_LOGPROBS:
            self._parameters["top_logprobs"] = FEW_LOGPROBS
            return
        value = self._parameters.pop(refusal.parameter)
        if refusal.parameter == "logprobs":
            del self._parameters["top_logprobs"]
        if refusal.parameter == "max_tokens":
            self._parameters["max_completion_tokens"] = value
        log.warning("the judge is asked without %s from now on: %s", refusal.parameter, words)

    def _report(self, pairs: Sequence[Sequence[Reading | TooLong]]) -> None:
        """Say how many pairs have no verdict, and once what concerns all of them."""
        num_too_long = sum(any(isinstance(answer, TooLong) for answer in pair) for pair in pairs)
        readings = [[answer for answer in pair if isinstance(answer, Reading)] for pair in pairs]
        whole = [found for found, pair in zip(readings, pairs, strict=True) if len(found) == len(pair)]
        unreadable = [
            next(self._caller.without_secrets(answer.wrote) for answer in pair if answer.first_win is None)
            for pair in whole
            if any(answer.first_win is None for answer in pair)
        ]
        if num_too_long:
            log.warning("%d of %d pairs are too long for the judge, and carry no weight", num_too_long, len(pairs))
        if unreadable:
            log.warning("%d of %d verdicts cannot be read, and carry no weight", len(unreadable), len(pairs))
        name = self._options.model
        if len(unreadable) == len(whole) >= ENOUGH_PAIRS:
            self._say_once(
                f"no verdict of the judge {name} can be read: asked for A or B, it writes {unreadable[0][:80]!r}",
                "if it reasons first, give it room with --set judge.max_tokens=2000",
            )
        if any(answer.first_win is not None and not answer.has_logprobs for pair in readings for answer in pair):
            self._say_once(
                f"the judge {name} gives no log-probabilities",
                "its verdicts are read from what it writes, and count as certain",
            )

    def _say_once(self, what: str, more: str) -> None:
        if (self._caller.url, more) not in _SAID:
            _SAID.add((self._caller.url, more))
            log.warning("%s; %s", what, more)


def _leaning(answer: Reading | TooLong, *, is_swapped: bool) -> float | None:
    """How much more than a half the answer gives the first response; None where it gives no verdict."""
    if isinstance(answer, TooLong) or answer.first_win is None:
        return None
    return (answer.first_win - 0.5) * (-1 if is_swapped else 1)


def _key(variable: str, endpoint: httpx.URL) -> str:
    """The key that ``variable`` holds; none is needed on this machine. Raises ConfigError without showing it."""
    key = os.environ.get(variable, "").strip()
    if not key and not is_on_this_machine(str(endpoint)):
        raise ConfigError(
            f"the judge at {endpoint.host} wants a key, and the environment variable {variable} is not set",
            f"export {variable}, or name another variable with --set judge.key_env=NAME",
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the key in the environment variable {variable} has characters that no key has", "set it anew"
        )
    if key and endpoint.scheme == "http" and not is_on_this_machine(str(endpoint)):
        log.warning("the key in %s goes to %s unencrypted", variable, endpoint.host)
    return key

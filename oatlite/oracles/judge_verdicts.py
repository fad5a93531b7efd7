"""What an OpenAI-compatible endpoint answers to "A or B?", as the probability that A is meant.

The verdict is the first token where the judge may write only one, and else the last word of what it wrote. Its
probability is read from the alternatives that the endpoint lists for that token: the mass on all spellings of A
("A", " A", "a", "**A", ...) over that on A and B together. Without such a list the word counts as certain.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from oatlite.oracles.calls import BadAnswer

FIRST, SECOND = "A", "B"
MIN_MASS = 0.01
"""Where A and B together are less likely, the judge was about to say something else."""
LEAST = -9999.0
"""What endpoints write for a log-probability of no probability at all."""
TOO_LONG = re.compile(
    r"This model's maximum context length is \d+ tokens|The \w+ prompt \(length \d+\) .*maximum model length of \d+"
)
"""How OpenAI begins and vLLM's server does, then how vLLM's engine does. Not sought further on: errors quote input."""
TOO_LONG_CODE = "context_length_exceeded"
NO_LOGPROBS = "You are not allowed to request logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """``first_win`` is None where no verdict can be read in what the judge ``wrote``."""

    first_win: float | None
    wrote: str
    has_logprobs: bool = True


@dataclass(frozen=True, slots=True)
class TooLong:
    """The question does not fit into the judge's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """The endpoint does not take a parameter of the request, for a reason in ``words``."""

    parameter: str
    words: str


def read_answer(answer: bytes, max_tokens: int) -> Reading:
    """The verdict of a judge that could write ``max_tokens``. Raises BadAnswer for what no such endpoint answers."""
    choice = _first_choice(answer)
    text, tokens = _text(choice), _tokens(choice)
    at: dict[str, Any] | None
    if max_tokens == 1:
        verdict, at = _label(text), next(iter(tokens), None)
    else:
        verdict = None if choice.get("finish_reason") == "length" else _last_word(text)
        at = None
        if verdict is not None:
            at = next((token for token in reversed(tokens) if _label(token["token"]) == verdict), None)
    share = None if at is None else _first_share(at)
    if share is not None:
        return Reading(first_win=share, wrote=text)
    if verdict is None:
        return Reading(first_win=None, wrote=text)
    return Reading(first_win=1.0 if verdict == FIRST else 0.0, wrote=text, has_logprobs=False)


def read_refusal(status: int, answer: str) -> TooLong | Unsupported | None:
    """What a refusal means that need not end the run; None for any other. ``answer`` may be cut short.

    OpenAI's newer models want ``max_completion_tokens`` for ``max_tokens``, take no temperature but their own (400)
    and give no log-probabilities (400, or 403 without a parameter's name); vLLM's server may limit their number (400).
    """
    error = _json(answer)
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if not isinstance(error, dict) or status not in (400, 403):
        return None
    words, parameter = str(error.get("message")), error.get("param")
    if parameter in ("logprobs", "top_logprobs") or words.startswith(NO_LOGPROBS):
        return Unsupported(parameter="logprobs", words=words)
    if status == 400 and (error.get("code") == TOO_LONG_CODE or TOO_LONG.match(words)):
        return TooLong()
    if status == 400 and parameter == "temperature":
        return Unsupported(parameter="temperature", words=words)
    if status == 400 and parameter == "max_tokens" and "max_completion_tokens" in words:
        return Unsupported(parameter="max_tokens", words=words)
    return None


def _label(text: str) -> str | None:
    """FIRST or SECOND, if ``text`` spells it; spaces and marks around a letter, a tokenizer's own among them, don't
    count."""
    letters = re.sub(r"[\W_Ġ]+", "", text).upper()
    return letters if letters in (FIRST, SECOND) else None


def _last_word(text: str) -> str | None:
    """The verdict that the last line ends with; none where it names the other answer, too ("A is better than B")."""
    lines = [line for line in text.splitlines() if re.search(r"[^\W_]", line)]
    words = re.findall(r"[^\W_]+", lines[-1]) if lines else []
    verdict = _label(words[-1]) if words else None
    return verdict if len({FIRST, SECOND} & {*words, verdict}) == 1 else None


def _first_share(token: dict[str, Any]) -> float | None:
    """The mass on A over the mass on A and B, where a token was written; None where there is too little of either."""
    alternatives = [_mass(entry) for entry in token["top_logprobs"]]
    if token["token"] not in [text for text, _ in alternatives]:
        alternatives.append(_mass(token))
    first, second = (sum(mass for text, mass in alternatives if _label(text) == label) for label in (FIRST, SECOND))
    return first / (first + second) if first + second >= MIN_MASS else None


def _json(answer: bytes | str) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


def _first_choice(answer: bytes) -> dict[str, Any]:
    value = _json(answer)
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadAnswer("answers with something that is no chat completion: is this its address?")
    return choices[0]


def _text(choice: dict[str, Any]) -> str:
    """What the judge wrote; nothing where it refused, or is still thinking."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else False
    if content is None:
        return ""
    if not isinstance(content, str):
        raise BadAnswer("answers with a chat completion that has no message")
    return content


def _tokens(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that the judge wrote, each with the alternatives to it; none if the endpoint does not list any."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not tokens:
        return []
    if not isinstance(tokens, list) or not all(isinstance(t, dict) and isinstance(t.get("token"), str) for t in tokens):
        raise BadAnswer("answers with log-probabilities of what are no tokens")
    lists = [token.get("top_logprobs") for token in tokens]
    return tokens if all(isinstance(alternatives, list) and alternatives for alternatives in lists) else []


def _mass(entry: Any) -> tuple[str, float]:
    """Text and probability of a token; raises BadAnswer for what is no probability."""
    text: Any
    logprob: Any
    text, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
    is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not isinstance(text, str) or not is_number or not logprob <= 1e-3:  # which NaN is not, either
        raise BadAnswer(f"answers with {str(logprob)[:40]} as the log-probability of a token")
    return text, math.exp(max(logprob, LEAST))

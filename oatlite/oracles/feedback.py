"""The message between an oracle's client and its server: oat's ``/get_feedback``, with a few fields more.

A request is a msgpack map. ``batch_prompt`` holds B prompts; either ``batch_candidates`` holds B pairs of responses,
and the answer's ``batch_first_win_prob`` B win probabilities, or ``batch_response`` holds B responses, and the
answer's ``batch_score`` B rewards; what is not asked for is empty. The rest is ours, and oat ignores it:

    token             request   the server's token, if it wants one
    batch_reference   request   B reference answers, for an oracle that reads them
    batch_is_valid    answer    B booleans: whether the oracle could answer; where not, the probability is 0.5, the
                                reward NaN, and neither means anything
    batch_first_score, batch_second_score
                      answer    B rewards each of an oracle that scores, NaN where there is none

Up to version 0.0.5 oat asked at ``/compare`` and sent ``batch_prompt`` and ``batch_candidates`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from oatlite.config.schema import MAX_PAIRS
from oatlite.oracles.base import Flags, Floats, Verdicts

PATH, OLD_PATH = "/get_feedback", "/compare"
MAX_FIELDS = 32
MAX_TOKEN_BYTES = 4096


class BadMessage(ValueError):
    """It is not what it should be; ``str`` says why, and never quotes a text of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """B prompts with B pairs of responses, to compare, or with B responses, to score; see the top of this file."""

    prompts: list[str]
    candidates: list[list[str]]
    responses: list[str]
    references: list[str] | None
    token: str | None

    def __len__(self) -> int:
        return len(self.prompts)


def encode_comparison(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str] | None = None,
    token: str | None = None,
) -> bytes:
    """The body that asks which response of each pair is better."""
    message: dict[str, Any] = {
        "batch_prompt": list(prompts),
        "batch_response": [],
        "batch_candidates": [list(pair) for pair in zip(first, second, strict=True)],
    }
    if references is not None:
        message["batch_reference"] = list(references)
    if token is not None:
        message["token"] = token
    return msgpack.packb(message)


def decode_request(body: bytes) -> Request:
    """Raises BadMessage for anything but a request."""
    message = _unpack(body)
    prompts = _texts(message, "batch_prompt")
    candidates = message.get("batch_candidates", [])
    if not isinstance(candidates, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in candidates
    ):
        raise BadMessage("batch_candidates is no list of pairs of texts")
    responses = _texts(message, "batch_response", [])
    if candidates and responses:
        raise BadMessage("batch_candidates and batch_response are both given; leave one of them empty")
    asked = "batch_response" if responses else "batch_candidates"
    if len(responses or candidates) != len(prompts):
        raise BadMessage(f"there are {len(prompts)} prompts and {len(responses or candidates)} of {asked}")
    references = _texts(message, "batch_reference") if message.get("batch_reference") is not None else None
    if references is not None and len(references) != len(prompts):
        raise BadMessage(f"there are {len(prompts)} prompts and {len(references)} of batch_reference")
    token = message.get("token")
    if token is not None and not (isinstance(token, str) and len(token) <= MAX_TOKEN_BYTES):
        raise BadMessage("token is no text, or too long")
    return Request(prompts=prompts, candidates=candidates, responses=responses, references=references, token=token)


def encode_scores(scores: Floats) -> bytes:
    """The answer to B responses."""
    return msgpack.packb(
        {
            "batch_score": scores.tolist(),
            "batch_first_win_prob": [],
            "batch_is_valid": np.isfinite(scores).tolist(),
        }
    )


def encode_verdicts(verdicts: Verdicts) -> bytes:
    """The answer to B pairs."""
    message = {
        "batch_score": [],
        "batch_first_win_prob": np.where(verdicts.is_valid, verdicts.first_win, np.float32(0.5)).tolist(),
        "batch_is_valid": verdicts.is_valid.tolist(),
    }
    if verdicts.first_scores is not None and verdicts.second_scores is not None:
        message["batch_first_score"] = verdicts.first_scores.tolist()
        message["batch_second_score"] = verdicts.second_scores.tolist()
    return msgpack.packb(message)


def decode_verdicts(body: bytes, count: int) -> Verdicts:
    """An answer on ``count`` pairs, ours or oat's. Raises BadMessage for anything else."""
    message = _unpack(body)
    if "batch_first_win_prob" not in message:
        raise BadMessage("it has no batch_first_win_prob")
    first_win = _numbers(message, "batch_first_win_prob", count)
    if not np.isfinite(first_win).all():
        raise BadMessage("batch_first_win_prob holds a number that is not finite")
    if ((first_win < 0) | (first_win > 1)).any():
        raise BadMessage("batch_first_win_prob holds a number outside [0, 1]")
    is_valid: Flags = np.ones(count, np.bool_)
    if message.get("batch_is_valid") is not None:
        flags = message["batch_is_valid"]
        if not isinstance(flags, list) or len(flags) != count or not all(isinstance(flag, bool) for flag in flags):
            raise BadMessage(f"batch_is_valid is no list of {count} booleans")
        is_valid = np.array(flags, np.bool_)
    scores: list[Floats | None] = [None, None]
    if all(message.get(name) is not None for name in ("batch_first_score", "batch_second_score")):
        for side, name in enumerate(("batch_first_score", "batch_second_score")):
            found = _numbers(message, name, count)
            if np.isinf(found).any() or np.isnan(found[is_valid]).any():
                raise BadMessage(f"{name} holds a number that is not finite")
            scores[side] = found
    return Verdicts(first_win=first_win, is_valid=is_valid, first_scores=scores[0], second_scores=scores[1])


def _unpack(body: bytes) -> Mapping[str, Any]:
    try:
        # Refused where they are announced: what is nested takes many times its bytes on the wire.
        message = msgpack.unpackb(
            body, raw=False, max_array_len=MAX_PAIRS, max_map_len=MAX_FIELDS, max_bin_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"it is not msgpack, or too large ({type(error).__name__})") from None
    if not isinstance(message, dict) or not all(isinstance(name, str) for name in message):
        raise BadMessage("it is no map with names")
    return message


def _texts(message: Mapping[str, Any], name: str, default: list[str] | None = None) -> list[str]:
    texts = message.get(name, default)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadMessage(f"{name} is no list of texts")
    return texts


def _numbers(message: Mapping[str, Any], name: str, count: int) -> Floats:
    """(count,) float32; a number that does not fit is infinite."""
    values = message[name]
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise BadMessage(f"{name} is no list of numbers")
    if len(values) != count:
        raise BadMessage(f"{name} has {len(values)} numbers for {count} pairs")
    largest = float(np.finfo(np.float32).max)
    fitting = [value if not abs(value) > largest else math.copysign(math.inf, value) for value in values]
    return np.array(fitting, np.float32)

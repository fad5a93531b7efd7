"""What oat's client sends and reads, and what its server reads and sends, written from their behaviour.

oat encodes with msgspec; nothing of oatlite is used here.
"""

import math

import msgspec


def preference_body(prompts, first, second):
    pairs = list(zip(first, second, strict=True))  # tuples, as oat has them
    return msgspec.msgpack.encode({"batch_prompt": prompts, "batch_response": [], "batch_candidates": pairs})


def old_preference_body(prompts, first, second):
    """Up to version 0.0.5, sent to /compare."""
    return msgspec.msgpack.encode({"batch_prompt": prompts, "batch_candidates": list(zip(first, second, strict=True))})


def reward_body(prompts, responses):
    return msgspec.msgpack.encode({"batch_prompt": prompts, "batch_response": responses, "batch_candidates": []})


def read_win_probs(answer):
    return msgspec.msgpack.decode(answer)["batch_first_win_prob"]


def read_scores(answer):
    return msgspec.msgpack.decode(answer)["batch_score"]


class Request(msgspec.Struct, kw_only=True):
    batch_prompt: list[str]
    batch_response: list[str]
    batch_candidates: list[list[str]]


class Response(msgspec.Struct, kw_only=True):
    batch_score: list[float]
    batch_first_win_prob: list[float]


def oats_server(score):
    """The answer of oat's server to a body, where ``score(prompt, response)`` is its reward model."""

    def answer(body):
        request = msgspec.msgpack.decode(body, type=Request)
        scores, win_probs = [], []
        if request.batch_candidates:
            for prompt, (first, second) in zip(request.batch_prompt, request.batch_candidates, strict=True):
                win_probs.append(1 / (1 + math.exp(score(prompt, second) - score(prompt, first))))
        else:
            scores = [score(*pair) for pair in zip(request.batch_prompt, request.batch_response, strict=True)]
        return msgspec.msgpack.encode(Response(batch_score=scores, batch_first_win_prob=win_probs))

    return answer

"""The process behind ``oatlite serve-oracle``: Mosec with a gate, which reads requests, and workers, which answer.

Mosec gives all requests of a dynamic batch one status, so what is wrong with one of them must be found before they
are put together: that is the gate's work. They are processes, and a request goes from one to another as it came.

Mosec's processes get their settings by environment variables, and its HTTP half shows no header to them: the token
is a field of the message.
"""

from __future__ import annotations

import hmac
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from mosec import ClientError, Runtime, Server, ServerError, ValidationError, Worker

from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config, OracleConfig
from oatlite.errors import ConfigError, OatliteError, OracleError
from oatlite.oracles import PreferenceOracle, RewardOracle, build_oracle, checked
from oatlite.oracles.base import checked_scores
from oatlite.oracles.feedback import (
    OLD_PATH,
    PATH,
    BadMessage,
    Request,
    decode_request,
    encode_scores,
    encode_verdicts,
)
from oatlite.oracles.server_settings import (
    FAILED,
    NEEDS_REFERENCES,
    NOTES,
    READY,
    SCORES,
    SETTINGS,
    TOKEN,
    ServerSettings,
    WorkerSettings,
)

UNREAD_S = 60.0


class Gate(Worker):
    """Lets well-formed requests through, one at a time, that have the right token and ask for what can be answered."""

    resp_mime_type = "application/msgpack"

    def __init__(self) -> None:
        super().__init__()
        self._token = os.environ.get(TOKEN, "")
        self._notes = Path(os.environ[NOTES])

    def deserialize(self, data: bytes) -> bytes:
        """``data`` itself, known to be a request. Raises what Mosec answers with 422 and 400."""
        try:
            request = decode_request(data)
        except BadMessage as error:
            raise ValidationError(str(error)) from None
        if self._token and not hmac.compare_digest((request.token or "").encode(), self._token.encode()):
            raise ClientError(f"the token is missing or wrong; set {TOKEN} to the same at both ends")
        if request.responses and SCORES not in self._traits:
            raise ValidationError("this oracle only compares; ask with batch_candidates")
        if request.references is None and NEEDS_REFERENCES in self._traits:
            raise ValidationError(
                "this oracle takes references; send batch_reference (oatlite: --reference-key COLUMN)"
            )
        return data

    @cached_property
    def _traits(self) -> list[str]:
        """The oracle's, as a worker noted them when it was ready; before, no request comes here."""
        return next(self._notes.glob(f"{READY}*")).read_text().split()

    def forward(self, data: bytes) -> bytes:
        return data

    def serialize_ipc(self, data: bytes) -> bytes:
        return data  # and no pickle, which is Mosec's default


class Scorer(Worker):
    """Answers requests that the gate let through, several at a time as one batch for the oracle."""

    resp_mime_type = "application/msgpack"

    def __init__(self) -> None:
        super().__init__()
        settings = WorkerSettings(**json.loads(os.environ[SETTINGS]))
        notes = Path(settings.notes)
        try:
            self._oracle = load(settings)
        except OatliteError as error:
            _fail(notes / f"{FAILED}{settings.index}", [error.exit_code, error.message, error.fix])
        except Exception as error:  # told in one line by whoever started us, and here in full
            traceback.print_exc()
            why = f"a worker failed at its start: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            _fail(notes / f"{FAILED}{settings.index}", [OracleError.exit_code, why, ""])
        _leave(notes / f"{READY}{settings.index}", traits(self._oracle))

    def deserialize_ipc(self, data: bytes) -> Request:
        return decode_request(data)

    def forward(self, data: Any) -> Any:
        """The answers to a list of requests, or to one where Mosec makes no batches.

        An oracle that raises fails them all, and their clients ask again.
        """
        try:
            return answers(self._oracle, data) if isinstance(data, list) else answers(self._oracle, [data])[0]
        except OracleError as error:
            raise ServerError(str(error)) from error

    def serialize(self, data: bytes) -> bytes:
        return data


def traits(oracle: PreferenceOracle) -> str:
    """What the gate must know of it, in words."""
    words = {SCORES: isinstance(oracle, RewardOracle), NEEDS_REFERENCES: oracle.needs_references}
    return " ".join(word for word, is_so in words.items() if is_so)


def load(settings: WorkerSettings) -> PreferenceOracle:
    """The oracle of a worker, which has answered once. Raises ConfigError or OracleError."""
    options = OracleConfig.model_validate(settings.oracle)
    (name,) = options.path
    if settings.index and options.chat_template is None:
        options = options.model_copy(update={"chat_template": False})  # the first worker says what there is to say
    if kind_of(name) == "model":
        from transformers.utils import logging

        logging.disable_progress_bar()
    if settings.device == "auto":
        _check_splits(name)
    oracle = build_oracle(options.path, Config(oracle=options), device=settings.device)
    try:  # numbers are texts too, and what a function that checks answers may want to read
        checked(oracle.compare(["What is 1 + 1?"], ["2"], ["3"], ["2"]), 1)
    except OracleError as error:
        if kind_of(name) != "function":
            raise
        asked = "it was asked whether 2 or 3 is the better answer to What is 1 + 1?, with the reference 2"
        raise ConfigError(error.message, error.fix or f"{asked}: return None where it cannot say") from error
    return oracle


def _check_splits(name: str) -> None:
    from oatlite.oracles.loading import is_pairrm, read_config

    if kind_of(name) != "model" or is_pairrm(read_config(name)):
        raise ConfigError(f"{name} is no model that is split over devices", "leave --devices-per-worker out")


def answers(oracle: PreferenceOracle, requests: Sequence[Request]) -> list[bytes]:
    """An answer to each request; those that ask alike are put to the oracle together.

    Raises OracleError as the oracle does.
    """
    found: list[bytes] = [b""] * len(requests)
    groups: dict[tuple[bool, bool], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((bool(request.responses), request.references is not None), []).append(i)
    for (is_for_scores, _), members in groups.items():
        answer = _scores if is_for_scores else _verdicts
        for i, body in zip(members, answer(oracle, [requests[i] for i in members]), strict=True):
            found[i] = body
    return found


def _verdicts(oracle: PreferenceOracle, requests: Sequence[Request]) -> list[bytes]:
    pairs = [pair for request in requests for pair in request.candidates]
    verdicts = checked(
        oracle.compare(
            _all(requests, lambda request: request.prompts),
            [first for first, _ in pairs],
            [second for _, second in pairs],
            _references(requests),
        ),
        len(pairs),
    )
    return [encode_verdicts(verdicts.part(part)) for part in _parts(requests)]


def _scores(oracle: PreferenceOracle, requests: Sequence[Request]) -> list[bytes]:
    assert isinstance(oracle, RewardOracle), "the gate lets nobody else ask for scores"
    responses = _all(requests, lambda request: request.responses)
    scores = oracle.score(_all(requests, lambda request: request.prompts), responses, _references(requests))
    scores = checked_scores(scores, len(responses))
    return [encode_scores(scores[part]) for part in _parts(requests)]


def _references(requests: Sequence[Request]) -> list[str] | None:
    if any(request.references is None for request in requests):
        return None
    return _all(requests, lambda request: request.references or [])


def _all(requests: Sequence[Request], texts: Callable[[Request], list[str]]) -> list[str]:
    return [text for request in requests for text in texts(request)]


def _parts(requests: Sequence[Request]) -> list[slice]:
    ends = np.cumsum([len(request) for request in requests]).tolist()
    return [slice(end - len(request), end) for end, request in zip(ends, requests, strict=True)]


def _fail(note: Path, words: list[int | str]) -> NoReturn:
    """Leave ``words`` for the command that started us, which ends us when it has read them. Were we to end first,
    Mosec might add lines of its own."""
    _leave(note, json.dumps(words))
    time.sleep(UNREAD_S)
    sys.exit(1)


def _leave(note: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = note.with_name(f".{note.name}")
    unfinished.write_text(text)
    unfinished.rename(note)


def serve(settings: ServerSettings) -> None:
    """Until SIGTERM, or until Mosec gives up."""
    sys.argv[1:] = settings.mosec_arguments()
    server = Server()
    gate = Runtime(Gate, num=1, env=[{"CUDA_VISIBLE_DEVICES": "", NOTES: settings.workers[0].notes}])
    scorers = Runtime(
        Scorer,
        num=len(settings.workers),
        max_batch_size=settings.max_batch,
        max_wait_time=settings.max_wait_ms,
        timeout=settings.timeout_s,
        env=[worker.environment() for worker in settings.workers],
    )
    server.register_runtime({PATH: [gate, scorers], OLD_PATH: [gate, scorers]})
    server.run()


if __name__ == "__main__":
    # Semaphores get a name by which they are found, and removed, after a process that was killed.
    multiprocessing.current_process()._config["semprefix"] = sys.argv[1]  # type: ignore[attr-defined]
    serve(ServerSettings.read(sys.stdin.read()))

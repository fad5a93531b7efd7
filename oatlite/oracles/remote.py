"""An oracle behind a server: ``oatlite serve-oracle``, or oat's; :mod:`oatlite.oracles.feedback` is what they say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from oatlite.config.schema import RemoteConfig
from oatlite.errors import ConfigError
from oatlite.oracles.base import Floats, PreferenceOracle, Verdicts
from oatlite.oracles.calls import BadAnswer, Caller
from oatlite.oracles.feedback import PATH, BadMessage, decode_verdicts, encode_comparison


class RemoteOracle(PreferenceOracle):
    """Asks the server at ``config.url`` about ``config.batch_size`` pairs at a time, several requests at once.

    A call answers for all its pairs by ``deadline_s``, or raises OracleError with the url; of a call that failed in
    part nothing is used. The token in the environment variable ``config.token_env``, if it is set, goes along.
    """

    def __init__(self, config: RemoteConfig, *, deadline_s: float) -> None:
        if config.url is None:
            raise ConfigError("the oracle is remote, and its server is not named", "add --oracle-url http://HOST:PORT")
        self._batch_size = config.batch_size
        self._token = os.environ.get(config.token_env) or None
        self._caller = Caller(
            feedback_url(config.url),
            what="the oracle server",
            if_unreachable="start it with oatlite serve-oracle, or give another --oracle-url",
            concurrency=config.concurrency,
            timeout_s=config.timeout_s,
            deadline_s=deadline_s,
            max_answer_bytes=config.max_answer_mib << 20,
            headers={"Content-Type": "application/msgpack"},
            secrets=[self._token or ""],
        )

    @property
    def num_failures(self) -> int:
        """See :attr:`PreferenceOracle.num_failures`."""
        return self._caller.num_failures

    def close(self) -> None:
        """See :meth:`PreferenceOracle.close`."""
        self._caller.close()

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`."""
        if not len(prompts) == len(first) == len(second) == len(prompts if references is None else references):
            raise ValueError("prompts, responses and references differ in number")
        parts = [slice(start, start + self._batch_size) for start in range(0, len(prompts), self._batch_size)]
        bodies = [
            encode_comparison(
                prompts[part],
                first[part],
                second[part],
                None if references is None else references[part],
                self._token,
            )
            for part in parts
        ]
        counts = [len(prompts[part]) for part in parts]

        def read(index: int, answer: bytes) -> Verdicts:
            try:
                return decode_verdicts(answer, counts[index])
            except BadMessage as error:
                raise BadAnswer(f"gives an answer that cannot be used: {error}") from None

        return _joined(self._caller.ask_all(bodies, read))


def feedback_url(url: str) -> str:
    """``url``, with oat's path where it has none. Raises ConfigError for what is no address, or holds a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"remote.url = {url} is no web address", "type --oracle-url http://HOST:PORT")
    if parts.username is not None:
        raise ConfigError(
            "remote.url holds a name or a password, which would be in logs", "type it without what is before the @"
        )
    return url if parts.path.strip("/") else urlunsplit(parts._replace(path=PATH))


def _joined(parts: Sequence[Verdicts]) -> Verdicts:
    def scores(found: Sequence[Floats | None]) -> Floats | None:
        known = [part for part in found if part is not None]
        return np.concatenate(known) if known and len(known) == len(found) else None

    return Verdicts(
        first_win=np.concatenate([np.zeros(0, np.float32), *(part.first_win for part in parts)]),
        is_valid=np.concatenate([np.zeros(0, np.bool_), *(part.is_valid for part in parts)]),
        first_scores=scores([part.first_scores for part in parts]),
        second_scores=scores([part.second_scores for part in parts]),
    )

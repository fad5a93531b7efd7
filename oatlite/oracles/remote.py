"""An oracle behind a server: ``oatlite serve-oracle``, or oat's; :mod:`oatlite.oracles.feedback` is what they say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from oatlite.config.flags import to_type
from oatlite.config.schema import RemoteConfig
from oatlite.oracles.base import PreferenceOracle, Verdicts
from oatlite.oracles.calls import BadAnswer, Caller
from oatlite.oracles.feedback import PATH, BadMessage, decode_verdicts, encode_comparison


class RemoteOracle(PreferenceOracle):
    """Asks the server at ``config.url`` about ``config.batch_size`` pairs at a time, several requests at once.

    A call answers for all its pairs by ``deadline_s``, or raises OracleError with the url; of a call that failed in
    part nothing is used. The token in the environment variable ``config.token_env``, if it is set, goes along.
    """

    def __init__(self, config: RemoteConfig, *, deadline_s: float) -> None:
        assert config.url is not None, "check_oracles sees to it"
        self._batch_size = config.batch_size
        self._token = os.environ.get(config.token_env) or None
        fewer = to_type("remote.batch_size", config.batch_size // 2)
        self._caller = Caller(
            feedback_url(config.url),
            what="the oracle server",
            if_unreachable="start it with oatlite serve-oracle, or give another --oracle-url",
            if_too_large=f"if that is too much for it, type {fewer}" if config.batch_size > 1 else "",
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

        return Verdicts.joined(self._caller.ask_all(bodies, read))


def feedback_url(url: str) -> str:
    """``url``, with oat's path where it has none."""
    parts = urlsplit(url)
    return url if parts.path.strip("/") else urlunsplit(parts._replace(path=PATH))

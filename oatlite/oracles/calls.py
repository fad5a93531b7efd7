"""Requests to somebody else's server: pooled, several at once, asked again with backoff, and believed in nothing.

An answer is read uncompressed and up to a limit, so that no server can fill our memory. What is worth asking again
(no connection, no answer in time, 408, 429, 5xx, an answer that makes no sense) is asked again after a pause, or when
the server said; a 429 holds all requests back, not the one that got it alone. What will not change (401, 404, ...)
ends the run at once. All requests of a call share one deadline.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import httpx

from oatlite.errors import OracleError

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
MAX_BAD_ANSWERS = 3
BUSY = 429
TOO_LARGE = (413, 422)
AGAIN = (408, 409, 425, BUSY, *range(500, 600))
REFUSED = (401, 403)
SPENT = "insufficient_quota"
"""In a 429 of OpenAI's: the account has no money left, which no pause mends."""
MAX_SHOWN = 200
MASK = "***"
IDENTITY = "identity"

logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request


class BadAnswer(Exception):
    """An answer arrived, and cannot be used; ``str`` says why."""


class _Failed(Exception):
    """One attempt failed; ``pause_s`` is what the server asked us to wait, if it did. ``is_for_all``: with whatever we
    asked it."""

    def __init__(
        self,
        why: str,
        pause_s: float | None = None,
        *,
        is_for_all: bool = False,
        is_bad_answer: bool = False,
        fix: str = "",
    ) -> None:
        super().__init__(why)
        self.is_for_all = is_for_all
        self.fix = fix
        self.pause_s = pause_s
        self.is_bad_answer = is_bad_answer


class _Refused(Exception):
    """The server will not answer a request, however often it is made: with ``error``, unless somebody knows better."""

    def __init__(self, status: int, beginning: str, error: OracleError) -> None:
        super().__init__(status)
        self.status = status
        self.beginning = beginning
        self.error = error


class Caller:
    """Posts to one ``url``, which ``what`` names in errors, as in "the oracle server".

    ``headers`` go with each request, and their values never into an error. ``deadline_s`` bounds a call of
    :meth:`ask_all`, ``timeout_s`` one attempt, ``concurrency`` the requests that are under way together.
    ``num_failures`` counts attempts that failed, since the start. ``if_unreachable`` says what to type where nobody
    answers at ``url``, and ``if_too_large`` where a request may be more than the server takes.
    """

    def __init__(
        self,
        url: str,
        *,
        what: str,
        if_unreachable: str = "",
        if_too_large: str = "",
        concurrency: int,
        timeout_s: float,
        deadline_s: float,
        max_answer_bytes: int,
        headers: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        self.url = url
        self.what = what
        self.num_failures = 0
        self._if_unreachable = if_unreachable
        self._if_too_large = if_too_large
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._max_answer_bytes = max_answer_bytes
        self._secrets = [secret for secret in secrets if secret]
        self._runner = asyncio.Runner()
        self._client: httpx.AsyncClient | None = None
        self._headers = {"Accept-Encoding": IDENTITY, **(headers or {})}
        self._not_before = 0.0

    def ask_all(
        self,
        bodies: Sequence[bytes],
        read: Callable[[int, bytes], T],
        read_refusal: Callable[[int, str], T | None] = lambda status, beginning: None,
        deadline: float | None = None,
    ) -> list[T]:
        """Post each body and give ``read(i, answer)`` of each, in order.

        ``read`` raises :class:`BadAnswer` for what it cannot use. Where the server refuses a request,
        ``read_refusal(status, beginning of the answer)`` may give something in place of an answer. Raises OracleError,
        with the url, when the deadline passes, when one body got MAX_BAD_ANSWERS bad answers, or when the server
        refuses and that gives None. ``deadline`` is in monotonic seconds; default: ``deadline_s`` from now.
        """
        if deadline is None:
            deadline = time.monotonic() + self._deadline_s
        return self._runner.run(self._ask_all(bodies, read, read_refusal, deadline))

    def close(self) -> None:
        if self._client is not None:
            self._runner.run(self._client.aclose())
        self._runner.close()

    def without_secrets(self, text: str) -> str:
        """``text`` with each secret masked, and the beginning of one that ``text`` was cut in."""
        for secret in self._secrets:
            text = text.replace(secret, MASK)
            cut = next((n for n in range(len(secret) - 1, 3, -1) if text.endswith(secret[:n])), 0)
            text = text[:-cut] + MASK if cut else text
        return text

    async def _ask_all(
        self,
        bodies: Sequence[bytes],
        read: Callable[[int, bytes], T],
        read_refusal: Callable[[int, str], T | None],
        deadline: float,
    ) -> list[T]:
        if self._client is None:
            limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
            self._client = httpx.AsyncClient(
                limits=limits,
                headers=self._headers,
                timeout=None,
                trust_env=not is_on_this_machine(self.url),  # no proxy leads back here
            )
        gate = asyncio.Semaphore(self._concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask(gate, deadline, body, partial(read, i), read_refusal))
                    for i, body in enumerate(bodies)
                ]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(
        self,
        gate: asyncio.Semaphore,
        deadline: float,
        body: bytes,
        read: Callable[[bytes], T],
        read_refusal: Callable[[int, str], T | None],
    ) -> T:
        num_attempts = num_bad = 0
        while True:
            async with gate:
                await self._wait_as_told(deadline)
                num_attempts += 1
                try:
                    return read(await self._post(body, deadline))
                except _Refused as refused:
                    instead = read_refusal(refused.status, refused.beginning)
                    if instead is None:
                        raise refused.error from None
                    return instead
                except BadAnswer as error:
                    failed = _Failed(self.without_secrets(str(error)), is_bad_answer=True)
                except _Failed as error:
                    failed = error
            self.num_failures += 1
            num_bad += failed.is_bad_answer
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (num_attempts - 1))
            if failed.pause_s is not None:
                pause_s = max(FIRST_PAUSE_S, failed.pause_s)
            if failed.is_for_all:
                self._not_before = max(self._not_before, time.monotonic() + pause_s)
            if num_bad >= MAX_BAD_ANSWERS or time.monotonic() + pause_s >= deadline:
                times = "once" if num_attempts == 1 else f"{num_attempts} times"
                raise self._error(f"{failed} (asked {times})", failed.fix)
            await asyncio.sleep(pause_s)

    async def _wait_as_told(self, deadline: float) -> None:
        """Until the pause that the server asked for is over, for all requests."""
        while (left_s := self._not_before - time.monotonic()) > 0:
            if self._not_before >= deadline:
                raise self._error(f"asks to wait {left_s:.0f} s, which is past the deadline")
            await asyncio.sleep(left_s)

    async def _post(self, body: bytes, deadline: float) -> bytes:
        """The answer's body. Raises _Failed for what is worth another attempt."""
        assert self._client is not None
        timeout_s = min(self._timeout_s, max(0.0, deadline - time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s), self._client.stream("POST", self.url, content=body) as response:
                if response.status_code != 200:
                    raise self._failure(response, await _beginning(response))
                return await self._read(response)
        except TimeoutError:
            raise _Failed(f"gave no answer within {timeout_s:.3g} s") from None
        except httpx.HTTPError as error:
            why = f"cannot be reached: {type(error).__name__} {self.without_secrets(str(error))}"
            raise _Failed(why, fix=self._if_unreachable) from None

    async def _read(self, response: httpx.Response) -> bytes:
        if _encoding(response).lower() != IDENTITY:
            raise BadAnswer(f"answers in the encoding {_encoding(response)[:MAX_SHOWN]}, which was not asked for")
        answer = bytearray()  # not a list of parts: an answer may come byte by byte
        async for part in response.aiter_raw():
            answer += part
            if len(answer) > self._max_answer_bytes:
                raise BadAnswer(f"answers with more than {self._max_answer_bytes} bytes")
        return bytes(answer)

    def _failure(self, response: httpx.Response, beginning: str) -> _Failed | _Refused:
        """What to raise for a status that is not 200."""
        code = response.status_code
        if code in REFUSED:  # what it says of the key may hold the key
            return _Refused(code, beginning, self._error(f"refuses us with {code}"))
        why = f"answers {code} {self.without_secrets(beginning)[:MAX_SHOWN]}".rstrip()
        if code not in AGAIN or SPENT in beginning:
            return _Refused(code, beginning, self._error(why, self._if_too_large if code in TOO_LARGE else ""))
        pause_s = _pause_asked_for(response.headers)
        why = why if pause_s is None else f"{why} and asks to wait {pause_s:.3g} s"
        return _Failed(why, pause_s, is_for_all=pause_s is not None or code == BUSY)

    def _error(self, why: str, fix: str = "") -> OracleError:
        return OracleError(f"{self.what} at {self.url} {why}", fix)


def is_on_this_machine(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _encoding(response: httpx.Response) -> str:
    return response.headers.get("content-encoding", "").strip() or IDENTITY


async def _beginning(response: httpx.Response) -> str:
    """The first words of an answer that is an error, on one line; of one that is encoded, none."""
    answer = bytearray()
    if _encoding(response).lower() == IDENTITY:
        async for part in response.aiter_raw():
            answer += part
            if len(answer) > 4 * MAX_SHOWN:
                break
    return " ".join(answer[: 4 * MAX_SHOWN].decode("utf-8", "replace").split())


def _pause_asked_for(headers: httpx.Headers) -> float | None:
    """Seconds to wait: OpenAI's ``retry-after-ms`` holds milliseconds, ``retry-after`` seconds or a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            pass
    header = headers.get("retry-after")
    if header is None:
        return None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None

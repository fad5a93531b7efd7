"""A fake of an OpenAI-compatible endpoint, on a real socket: it answers what a test tells it to, sense or nonsense."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class FakeJudgeServer:
    """``answer`` makes a reply of a request's body; ``asked``, ``headers`` and ``times`` are kept of each request."""

    answer: Callable[[dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[FakeJudgeServer]:
    fake = FakeJudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.times.append(time.monotonic())
            fake.headers.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
            fake.asked.append(body)
            status, headers, content = fake.answer(body)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_json(status: int, value: Any, **headers: str) -> Reply:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return status, {"Content-Type": "application/json"} | named, json.dumps(value).encode()


def error(status: int, message: str, **more: Any) -> Reply:
    return as_json(status, {"error": {"message": message, "type": "invalid_request_error", **more}})


def token(text: str, alternatives: dict[str, float]) -> dict[str, Any]:
    """A token that was written, beside ``alternatives`` with their probabilities, its own among them or not."""
    listed = [{"token": other, "logprob": math.log(mass), "bytes": None} for other, mass in alternatives.items()]
    return {"token": text, "logprob": math.log(alternatives.get(text, 1e-9)), "top_logprobs": listed}


def completion(text: str | None, tokens: list[dict[str, Any]] | None = None, finish_reason: str = "stop") -> Reply:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None if tokens is None else {"content": tokens},
        "finish_reason": finish_reason,
    }
    return as_json(200, {"id": "fake", "object": "chat.completion", "choices": [choice]})


def verdict(first: float) -> Reply:
    """An answer that gives the first response the probability ``first``."""
    text = "A" if first >= 0.5 else "B"
    return completion(text, [token(text, {"A": first, "B": 1 - first})], "length")

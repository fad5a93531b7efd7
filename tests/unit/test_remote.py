"""The remote oracle's client against servers on real sockets that answer well, badly, slowly, or not at all."""

import gzip
import logging
import math
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path

import msgpack
import numpy as np
import pytest
from misbehaving import drips, hangs, hangs_up, never_ends, sends, serving

from oatlite.config.schema import RemoteConfig
from oatlite.errors import OracleError
from oatlite.oracles import calls, checked
from oatlite.oracles.remote import RemoteOracle, feedback_url

TOKEN = "A-Secret-of-the-Server"
PAIRS = (["p", "q"], ["first", "one"], ["second", "other"])
SOON_S = 30.0  # far more than anything here takes


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("OATLITE_ORACLE_TOKEN", TOKEN)


def answer(win_probs, **more):
    return msgpack.packb({"batch_score": [], "batch_first_win_prob": win_probs, **more})


def longer_wins(body):
    pairs = msgpack.unpackb(body)["batch_candidates"]
    return answer([float(len(first) > len(second)) for first, second in pairs])


GOOD = sends(longer_wins)


def oracle(url, *, deadline_s=5.0, **changes):
    return RemoteOracle(RemoteConfig(url=url, **{"timeout_s": 5.0, **changes}), deadline_s=deadline_s)


def failure(url, pairs=PAIRS, **options):
    """The error of a comparison that must fail; it names the server and not the token."""
    remote = oracle(url, **options)
    with pytest.raises(OracleError) as error:
        remote.compare(*pairs)
    remote.close()
    assert f"the oracle server at {url}/get_feedback " in str(error.value)
    assert TOKEN not in repr(error.value) + str(error.value.__cause__) + str(error.value.__context__)
    return str(error.value)


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


# Answers


def test_pairs_come_back_in_order_whatever_the_batches():
    prompts = [f"p{i}" for i in range(23)]
    first, second = ["x" * (i * 7 % 11) for i in range(23)], ["y" * (i * 5 % 11) for i in range(23)]
    with serving(GOOD) as server:
        remote = oracle(server.url, batch_size=4, concurrency=3)
        verdicts = remote.compare(prompts, first, second)
        checked(verdicts, 23)
        assert verdicts.first_win.tolist() == [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
        assert verdicts.is_valid.all() and verdicts.first_scores is None
        assert remote.num_failures == 0
        assert len(server.requests) == 6
        assert len(remote.compare([], [], [])) == 0
        remote.close()
        assert len(server.requests) == 6, "nothing is asked about nothing"


def test_what_is_sent():
    with serving(GOOD) as server:
        remote = oracle(server.url)
        remote.compare(*PAIRS, references=["r", "s"])
        remote.close()
        path, headers, body, _ = server.requests[0]
    assert path == "/get_feedback"
    assert headers["Accept-Encoding"] == "identity"
    assert TOKEN not in str(headers), "where proxies would log it"
    assert msgpack.unpackb(body) == {
        "batch_prompt": ["p", "q"],
        "batch_response": [],
        "batch_candidates": [["first", "second"], ["one", "other"]],
        "batch_reference": ["r", "s"],
        "token": TOKEN,
    }


def test_without_a_token_or_references_neither_is_sent(monkeypatch):
    monkeypatch.delenv("OATLITE_ORACLE_TOKEN")
    with serving(GOOD) as server:
        remote = oracle(server.url)
        remote.compare(*PAIRS)
        remote.close()
        assert set(msgpack.unpackb(server.requests[0][2])) == {"batch_prompt", "batch_response", "batch_candidates"}


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:1", "http://h:1/get_feedback"),
        ("http://h:1/", "http://h:1/get_feedback"),
        ("https://h/compare", "https://h/compare"),
        ("http://h/a/b", "http://h/a/b"),
    ],
)
def test_the_path_is_oats_unless_the_url_has_one(url, asked):
    assert feedback_url(url) == asked


def test_scores_and_what_the_server_could_not_judge():
    parts = [
        answer(
            [0.9, 0.5],
            batch_is_valid=[True, False],
            batch_first_score=[2.0, math.nan],
            batch_second_score=[-0.5, 1.0],
        )
    ]
    with serving(sends(parts[0])) as server:
        remote = oracle(server.url)
        verdicts = checked(remote.compare(*PAIRS), 2)
        remote.close()
    assert verdicts.is_valid.tolist() == [True, False]
    np.testing.assert_array_equal(verdicts.first_scores, np.array([2, np.nan], np.float32))
    np.testing.assert_array_equal(verdicts.second_scores, np.array([-0.5, 1], np.float32))


def test_a_server_may_answer_with_whole_numbers():
    with serving(sends(answer([1, 0]))) as server:
        remote = oracle(server.url)
        assert remote.compare(*PAIRS).first_win.tolist() == [1.0, 0.0]
        remote.close()


# Answers that cannot be used

BAD = {
    "nan": answer([0.5, math.nan]),
    "infinite": answer([math.inf, 0.5]),
    "above one": answer([0.5, 1.0001]),
    "below zero": answer([-0.0001, 0.5]),
    "huge": answer([1e300, 0.5]),
    "huge whole": answer([2**63, 0]),
    "too few": answer([0.5]),
    "too many": answer([0.5] * 3),
    "texts": answer(["0.5", "0.5"]),
    "booleans": answer([True, False]),
    "nothing": answer(None),
    "no field": msgpack.packb({"batch_score": [1.0, 2.0]}),
    "no map": msgpack.packb([0.5, 0.5]),
    "names that are numbers": msgpack.packb({1: [0.5, 0.5]}),
    "flags of another number": answer([0.5, 0.5], batch_is_valid=[True]),
    "flags that are numbers": answer([0.5, 0.5], batch_is_valid=[1, 1]),
    "nan scores": answer([0.5, 0.5], batch_first_score=[math.nan, 0.0], batch_second_score=[0.0, 0.0]),
    "infinite scores": answer(
        [0.5, 0.5], batch_is_valid=[False] * 2, batch_first_score=[math.inf, 0.0], batch_second_score=[0.0, 0.0]
    ),
    "half a message": answer([0.5, 0.5])[:-3],
    "two messages": answer([0.5, 0.5]) * 2,
    "html": b"<!doctype html><title>Welcome to nginx!</title>",
    "json": b'{"batch_first_win_prob": [0.5, 0.5]}',
    "empty": b"",
    "announced array": b"\xdd\xff\xff\xff\xff",
    "announced map": b"\xdf\xff\xff\xff\xff",
    "deep": b"\x91" * 100_000,
    "object": msgpack.packb({"batch_first_win_prob": msgpack.ExtType(4, b"x" * 100)}),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_answer_is_asked_for_again_and_never_used(body):
    with serving(sends(body), GOOD) as server:
        remote = oracle(server.url)
        assert remote.compare(*PAIRS).first_win.tolist() == [0.0, 0.0]
        assert (remote.num_failures, len(server.requests)) == (1, 2)
        remote.close()


@pytest.mark.parametrize("body", [BAD["nan"], BAD["too few"], BAD["html"]])
def test_a_server_that_keeps_at_it_is_given_up_soon(body):
    with serving(sends(body)) as server:
        assert "cannot be used" in failure(server.url, deadline_s=60)
        assert len(server.requests) == calls.MAX_BAD_ANSWERS


def test_of_a_call_that_failed_in_part_nothing_is_used():
    def only_the_first(body):
        message = msgpack.unpackb(body)
        return longer_wins(body) if message["batch_prompt"] == ["p0"] else answer([math.nan])

    prompts = [f"p{i}" for i in range(8)]
    with serving(sends(only_the_first)) as server:
        pairs = (prompts, ["a"] * 8, ["b"] * 8)
        assert "not finite" in failure(server.url, pairs, batch_size=1, concurrency=2)


def test_an_oracle_that_has_failed_can_be_asked_again():
    with serving(*[sends(BAD["nan"])] * calls.MAX_BAD_ANSWERS, GOOD) as server:
        remote = oracle(server.url)
        with pytest.raises(OracleError):
            remote.compare(*PAIRS)
        assert remote.compare(*PAIRS).first_win.tolist() == [0.0, 0.0]
        remote.close()


# Servers that are not there, or slow


def test_nobody_listens():
    start = time.monotonic()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else gets the port
        said = failure(f"http://127.0.0.1:{silent.getsockname()[1]}", deadline_s=3)
    assert "cannot be reached: ConnectError" in said
    assert said.endswith("times); start it with oatlite serve-oracle, or give another --oracle-url")
    assert time.monotonic() - start < SOON_S


def test_a_server_that_comes_back_is_asked_again():
    with serving(sends(b"oops", 500), sends(b"", 503), hangs_up, GOOD) as server:
        remote = oracle(server.url)
        assert remote.compare(*PAIRS).first_win.tolist() == [0.0, 0.0]
        assert remote.num_failures == 3
        remote.close()


def test_retries_are_bounded_by_the_deadline_and_pause_longer_each_time():
    with serving(sends(b"out of \n memory", 500)) as server:
        start = time.monotonic()
        assert "answers 500 out of memory (asked" in failure(server.url, deadline_s=5)
        assert time.monotonic() - start < SOON_S
        times = [at for *_, at in server.requests]
        pauses = np.diff(times)
        assert 4 <= len(times) <= 9  # before a tenth, pauses of more than 5 s
        assert (pauses > 0.01 * 2.0 ** np.arange(len(pauses))).all()


@pytest.mark.parametrize("slow", [hangs, drips])
def test_one_slow_answer_is_asked_for_again(slow):
    with serving(slow, slow, GOOD) as server:
        remote = oracle(server.url, timeout_s=2.0, deadline_s=60)
        assert remote.compare(*PAIRS).first_win.tolist() == [0.0, 0.0]
        assert remote.num_failures == 2
        remote.close()


@pytest.mark.parametrize("slow", [hangs, drips])
def test_a_server_that_stays_slow_ends_by_the_deadline(slow):
    with serving(slow) as server:
        start = time.monotonic()
        pairs = ([f"p{i}" for i in range(6)], ["a"] * 6, ["b"] * 6)
        assert "gave no answer within" in failure(
            server.url, pairs, deadline_s=0.5, timeout_s=60.0, batch_size=1, concurrency=2
        )
        assert time.monotonic() - start < SOON_S


# Answers without measure


@pytest.mark.fault("14")
@pytest.mark.parametrize(
    "bomb",
    [
        sends(gzip.compress(b"\x00" * (64 << 20)), Content_Encoding="gzip"),
        sends(gzip.compress(b"\x00" * (64 << 20))),
        never_ends,
        lambda handler: never_ends(handler, Content_Length=str(1 << 40)),
    ],
    ids=["gzip", "gzip that is not said to be", "endless", "announced"],
)
def test_a_bomb_takes_no_memory(bomb):
    with serving(bomb) as server:
        before, highest, done = resident_mib(), [0.0], threading.Event()

        def watch():
            while not done.wait(0.002):
                highest[0] = max(highest[0], resident_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        said = failure(server.url, max_answer_mib=1)
        done.set()
        watcher.join()
        assert any(words in said for words in ("encoding gzip", "more than 1048576 bytes", "not msgpack"))
        assert len(server.requests) == calls.MAX_BAD_ANSWERS
        assert highest[0] - before < 40


def test_an_encoded_answer_is_not_decoded():
    with serving(sends(gzip.compress(answer([0.5, 0.5])), Content_Encoding="gzip")) as server:
        assert "answers in the encoding gzip, which was not asked for" in failure(server.url)


def test_an_answer_in_single_bytes_is_put_together():
    def crumbs(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for byte in longer_wins(handler.body):
            handler.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    with serving(crumbs) as server:
        remote = oracle(server.url)
        assert remote.compare(*PAIRS).first_win.tolist() == [0.0, 0.0]
        remote.close()


# What a server says of itself


@pytest.mark.parametrize(
    ("code", "words"),
    [(401, "refuses us with 401"), (403, "refuses us with 403"), (404, "answers 404"), (400, "answers 400")],
)
def test_what_will_not_change_ends_it_at_once(code, words):
    with serving(sends(f"no, not with {TOKEN}".encode(), code)) as server:
        assert words in failure(server.url, deadline_s=60)
        assert len(server.requests) == 1


@pytest.mark.parametrize("code", [413, 422])
def test_a_request_that_is_more_than_the_server_takes_names_the_option_to_lower(code):
    with serving(sends(b"too large", code)) as server:
        said = failure(server.url, deadline_s=60, batch_size=64)
        assert f"answers {code} too large; if that is too much for it, type --set remote.batch_size=32" in said
        assert len(server.requests) == 1
        assert "batch_size" not in failure(server.url, batch_size=1), "a pair cannot be cut up"


def test_an_error_that_is_endless_or_encoded_is_an_error_all_the_same():
    def endless(handler):
        handler.send_response(404)
        handler.end_headers()
        while True:
            handler.wfile.write(b"never ")

    for wrong in (endless, sends(gzip.compress(b"\x00" * (64 << 20)), 404, Content_Encoding="gzip")):
        with serving(wrong) as server:
            said = failure(server.url, deadline_s=60)
            assert "answers 404" in said and len(said) < 400
            assert len(server.requests) == 1


def test_a_redirect_is_not_followed():
    with serving(GOOD) as other, serving(sends(b"", 307, Location=f"{other.url}/get_feedback")) as server:
        assert "answers 307" in failure(server.url, deadline_s=60)
        assert other.requests == [], "the token and the texts stay with whom they were meant for"


@pytest.mark.parametrize(
    ("form", "least_s"), [("seconds", 0.4), ("date", 0.4), ("milliseconds", 1.2), ("nothing", 0.4)]
)
def test_a_server_that_is_busy_is_given_the_time_it_asks_for(form, least_s, monkeypatch):
    if form == "nothing":
        monkeypatch.setattr(calls, "FIRST_PAUSE_S", least_s)

    def busy(handler):
        headers = {
            "seconds": {"Retry_After": "0.4"},
            "date": {"Retry_After": formatdate(math.ceil(time.time()) + 2, usegmt=True)},
            "milliseconds": {"Retry_After_Ms": "1200", "Retry_After": "0"},
            "nothing": {},
        }
        sends(b"", 429, **headers[form])(handler)

    with serving(busy, GOOD) as server:
        remote = oracle(server.url, deadline_s=30, batch_size=1, concurrency=1)
        start = time.time()
        assert len(remote.compare(*PAIRS)) == 2
        remote.close()
        assert len(server.requests) == 3, "the other part waits too"
        assert time.time() - start >= least_s
        assert server.requests[1][3] - server.requests[0][3] >= least_s


@pytest.mark.parametrize("wait", ["3600", "inf", "1e9"])
def test_a_pause_past_the_deadline_ends_it_at_once(wait):
    with serving(sends(b"", 429, Retry_After=wait)) as server:
        start = time.monotonic()
        assert "answers 429" in failure(server.url, deadline_s=60)
        assert time.monotonic() - start < SOON_S
        assert len(server.requests) == 1


@pytest.mark.parametrize("wait", ["0", "-5", "nan", "soon", "Thu, 01 Jan 1970 00:00:00 GMT", ""])
def test_a_pause_of_nothing_is_no_storm(wait):
    with serving(sends(b"", 429, Retry_After=wait)) as server:
        failure(server.url, deadline_s=2)
        assert 2 <= len(server.requests) <= 210


# The token


@pytest.mark.parametrize(
    "wrong",
    [
        sends(f"your token {TOKEN} is odd".encode(), 500),
        sends(b" " * 790 + TOKEN.encode(), 422),
        sends((f"{TOKEN} " * 40).encode(), 500),
        sends(b"", 200, Content_Encoding=TOKEN),
        sends(msgpack.packb({"batch_first_win_prob": TOKEN})),
        sends(b"", 302, Location=f"http://127.0.0.1/{TOKEN}"),
        lambda handler: handler.wfile.write(f"HTTP/1.1 {TOKEN}\r\n\r\n".encode()),
    ],
    ids=["said", "cut", "said often", "encoding", "field", "redirect", "no HTTP"],
)
def test_the_token_is_in_no_error_and_no_log(wrong, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(wrong) as server:
        said = failure(server.url, deadline_s=0.3)
        assert TOKEN[:8] not in said
        text = "\n".join(
            record.getMessage() for record in caplog.records if not record.name.startswith(("httpcore", "asyncio"))
        )
        assert TOKEN not in text


def test_a_proxy_is_not_asked_the_way_back_to_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving(GOOD) as server:
        remote = oracle(server.url)
        assert len(remote.compare(*PAIRS)) == 2
        remote.close()


def test_connections_are_kept_and_as_many_as_allowed():
    together, most, lock = [0], [0], threading.Lock()
    all_three = threading.Barrier(3)
    ports = set()

    def slowly(handler):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
            ports.add(handler.client_address[1])
        all_three.wait(SOON_S)
        with lock:
            together[0] -= 1
        GOOD(handler)

    with serving(slowly) as server:
        remote = oracle(server.url, deadline_s=60, timeout_s=60.0, batch_size=1, concurrency=3)
        for _ in range(2):
            remote.compare([f"p{i}" for i in range(9)], ["a"] * 9, ["b"] * 9)
        remote.close()
    assert most[0] == 3
    assert len(ports) == 3

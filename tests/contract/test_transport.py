"""Hub and spokes over real Unix sockets: what arrives, what is dropped and counted, and that nothing waits forever."""

import contextlib
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from oatlite import transport
from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import CandidateBatch, Hello, Record, Stage, Stop
from oatlite.messages.codec import MAX_FRAMES, encode
from oatlite.messages.fields import MalformedMessage
from oatlite.transport import Hub, Spoke, address

RUN = "0123456789ab"
SOON_S = 30.0  # far more than anything here takes
BRIEFLY_S = 0.2


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="oatlite-test-", dir="/tmp"))  # private, and short enough for a socket
    yield path
    shutil.rmtree(path)


@pytest.fixture
def endpoints(folder):
    """Opens hubs and spokes on one address, and closes them."""
    opened = []

    class Endpoints:
        where = address(folder, "hub")

        def hub(self):
            opened.append(Hub(self.where, RUN))
            return opened[-1]

        def spoke(self, name="actor-0", run_id=RUN):
            opened.append(Spoke(self.where, name, run_id))
            return opened[-1]

        def raw(self, name=b"stranger"):
            """A socket that sends any frames."""
            opened.append(Raw(self.where, name))
            return opened[-1]

    yield Endpoints()
    for endpoint in opened:
        endpoint.close()


class Raw:
    def __init__(self, where, name):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name)
        self._socket.setsockopt(zmq.SNDTIMEO, 100)  # the one that floods must notice when it is told to stop
        self._socket.connect(where)

    def send(self, *frames):
        self._socket.send_multipart(frames)

    def close(self):
        self._socket.close(linger=0)
        self._context.term()


def hello(name="actor-0", run_id=RUN):
    return Hello(run_id=run_id, role=name, pid=1)


def note(text="", run_id=RUN):
    return Record(run_id=run_id, kind="note", body=str(text))


def greet(hub, spoke, name="actor-0"):
    """Let the hub learn of a spoke."""
    spoke.send(hello(name))
    peer, message = hub.receive(SOON_S)
    assert peer == name and isinstance(message, Hello)


def ends_soon(action):
    """Whether ``action`` ends, in a thread of its own so that one that hangs does not hang the tests."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(SOON_S)
    return not thread.is_alive()


# --------------------------------------------------------------------------- what arrives


def test_messages_arrive_in_order_both_ways_and_say_who_sent_them(endpoints):
    hub = endpoints.hub()
    spokes = {name: endpoints.spoke(name) for name in ("actor-0", "actor-1")}
    for name, spoke in spokes.items():
        greet(hub, spoke, name)
    for i in range(40):
        for name, spoke in spokes.items():
            spoke.send(note(f"{name} {i}"))
    received = [hub.receive(SOON_S) for _ in range(80)]
    for name in spokes:
        assert [m.body for peer, m in received if peer == name] == [f"{name} {i}" for i in range(40)]
    for i in range(40):
        for name in spokes:
            hub.send(name, note(f"to {name} {i}"))
    for name, spoke in spokes.items():
        assert [spoke.receive(SOON_S).body for _ in range(40)] == [f"to {name} {i}" for i in range(40)]


def test_what_a_spoke_says_before_there_is_a_hub_arrives(endpoints):
    endpoints.spoke().send(hello())
    assert endpoints.hub().receive(SOON_S)[0] == "actor-0"


def test_arrays_of_fifty_megabytes_arrive_whole(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    tokens = np.arange(6_250_000, dtype=np.int32)
    sent = CandidateBatch(
        run_id=RUN,
        batch_id="1",
        policy_version=0,
        samplers=["policy"],
        response_tokens=tokens,
        response_lengths=np.array([tokens.size], np.int32),
        sampler_logprobs=-tokens.astype(np.float32),
        is_finished=np.array([True]),
        texts=["long"],
        generate_s=0.0,
        sleep_s=0.0,
        wake_s=0.0,
    )
    spoke.send(sent)
    _, received = hub.receive(SOON_S)
    assert np.array_equal(received.response_tokens, tokens)
    assert np.array_equal(received.sampler_logprobs, sent.sampler_logprobs)
    hub.send("actor-0", received)
    assert np.array_equal(spoke.receive(SOON_S).response_tokens, tokens)


def test_close_lets_last_words_leave_when_it_is_given_time(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    for _ in range(50):
        spoke.send(note("x" * 1_000_000))  # more than a socket holds
    spoke.send(note("last"))
    spoke.close(flush_s=SOON_S)
    assert [len(hub.receive(SOON_S)[1].body) for _ in range(50)] == [1_000_000] * 50
    assert hub.receive(SOON_S)[1] == note("last")


# --------------------------------------------------------------------------- what is dropped


@pytest.mark.fault("16")
def test_foreign_and_malformed_messages_are_counted_and_dropped_while_good_ones_pass(endpoints, caplog):
    hub, spoke, stranger = endpoints.hub(), endpoints.spoke(), endpoints.raw()
    greet(hub, spoke)
    stranger.send(b"junk")
    stranger.send(b"")
    stranger.send(*[b"x"] * (MAX_FRAMES + 1))
    stranger.send(*[bytes(frame) for frame in encode(hello())], b"one frame too many")
    stranger.send(*encode(note(run_id="another")))
    stranger.send(*encode(note("good")))
    assert hub.receive(SOON_S) == ("stranger", note("good"))
    assert hub.dropped == {"malformed": 4, "foreign": 1}
    assert len(caplog.records) == 5 and all("stranger" in record.message for record in caplog.records)


def test_a_spoke_drops_messages_of_another_run_too(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    hub.send("actor-0", note(run_id="another"))
    hub.send("actor-0", note("good"))
    assert spoke.receive(SOON_S) == note("good")
    assert spoke.dropped == {"foreign": 1}


def test_a_name_that_is_no_text_harms_nobody(endpoints):
    hub = endpoints.hub()
    endpoints.raw(b"\xff\xfe").send(*encode(note("good")))
    peer, message = hub.receive(SOON_S)
    assert message == note("good") and "\ufffd" in peer
    with pytest.raises(WorkerDied):
        hub.send(peer, Stop(run_id=RUN))


def test_a_frame_over_the_limit_ends_that_connection_and_no_other(endpoints, monkeypatch):
    monkeypatch.setattr(transport, "MAX_FRAME_BYTES", 1 << 20)
    hub, spoke, stranger = endpoints.hub(), endpoints.spoke(), endpoints.raw()
    greet(hub, spoke)
    stranger.send(bytes(2 << 20))
    assert hub.receive(BRIEFLY_S) is None
    spoke.send(note("good"))
    assert hub.receive(SOON_S) == ("actor-0", note("good"))
    assert hub.dropped == {}  # it was never taken in


@pytest.mark.fault("16")
def test_an_oversized_message_is_refused_at_the_sender(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    huge = note("x" * ((1 << 20) + 1))
    with pytest.raises(MalformedMessage, match=r"Record\.body"):
        spoke.send(huge)
    with pytest.raises(MalformedMessage, match=r"Record\.body"):
        hub.send("actor-0", huge)
    spoke.send(note("good"))
    assert hub.receive(SOON_S) == ("actor-0", note("good"))


# --------------------------------------------------------------------------- deadlines


def test_receive_gives_up_at_its_deadline(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    for endpoint in (hub, spoke):
        start = time.monotonic()
        assert endpoint.receive(BRIEFLY_S) is None
        assert BRIEFLY_S * 0.9 <= time.monotonic() - start < SOON_S
        assert endpoint.receive(0) is None
        assert endpoint.receive(-1.0) is None


def test_a_message_that_is_there_is_received_even_with_no_time_left(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    hub.send("actor-0", note("first"))
    hub.send("actor-0", note("second"))
    assert spoke.receive(SOON_S) == note("first")
    deadline = time.monotonic() + SOON_S
    received = None
    while received is None and time.monotonic() < deadline:
        received = spoke.receive(0)
    assert received == note("second")


@pytest.mark.parametrize(
    "frames", [[b"junk"], [bytes(f) for f in encode(note(run_id="another"))]], ids=["junk", "foreign"]
)
def test_a_flood_of_what_is_dropped_does_not_move_the_deadline(endpoints, monkeypatch, frames):
    monkeypatch.setattr(transport.log, "warning", lambda *words: time.sleep(0.002))  # slower than the flood
    hub, stranger = endpoints.hub(), endpoints.raw()
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            with contextlib.suppress(zmq.Again):
                stranger.send(*frames)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        assert hub._socket.poll(round(SOON_S * 1000)), "the flood has not begun"
        received = []
        assert ends_soon(lambda: received.append(hub.receive(1.0)))
        assert received == [None]
        assert hub.dropped.total() > 10
    finally:
        stop.set()
        thread.join(SOON_S)


def test_sending_to_a_peer_that_was_never_there_names_it(endpoints):
    with pytest.raises(WorkerDied, match="actor-7 is not connected"):
        endpoints.hub().send("actor-7", Stop(run_id=RUN))


def test_a_peer_that_has_left_is_not_connected_any_more(endpoints):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    spoke.close()

    def send_until_it_is_noticed():
        deadline = time.monotonic() + SOON_S
        while time.monotonic() < deadline:
            hub.send("actor-0", Stop(run_id=RUN))
            time.sleep(0.01)

    with pytest.raises(WorkerDied, match="actor-0 is not connected"):
        send_until_it_is_noticed()


def fill(send):
    """Send until it is refused; a queue holds far less than this."""
    for _ in range(5000):
        send(note("x" * 100_000))


def test_a_peer_that_takes_nothing_is_named_at_the_deadline(endpoints, monkeypatch):
    monkeypatch.setattr(transport, "SEND_TIMEOUT_S", BRIEFLY_S)
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    with pytest.raises(DeadlineExceeded, match="actor-0 has not taken"):
        fill(lambda message: hub.send("actor-0", message))


@pytest.mark.parametrize("has_hub", [True, False])
def test_a_hub_that_takes_nothing_is_noticed_at_the_deadline(endpoints, monkeypatch, has_hub):
    monkeypatch.setattr(transport, "SEND_TIMEOUT_S", BRIEFLY_S)
    if has_hub:
        endpoints.hub()
    spoke = endpoints.spoke()
    with pytest.raises(DeadlineExceeded, match="the hub has not taken"):
        fill(spoke.send)


# --------------------------------------------------------------------------- coming back, and going


def test_a_peer_that_comes_back_under_its_name_takes_it_over(endpoints):
    hub, first = endpoints.hub(), endpoints.spoke()
    greet(hub, first)
    second = endpoints.spoke()
    greet(hub, second)
    hub.send("actor-0", note("for the living"))
    assert second.receive(SOON_S) == note("for the living")
    assert first.receive(BRIEFLY_S) is None


@pytest.mark.parametrize("flush_s", [0.0, BRIEFLY_S])
def test_close_never_hangs_over_what_nobody_takes(endpoints, flush_s):
    hub, spoke = endpoints.hub(), endpoints.spoke()
    greet(hub, spoke)
    unheard = endpoints.spoke("actor-1")
    for _ in range(60):
        hub.send("actor-0", note("x" * 100_000))
        spoke.send(note("x" * 100_000))
        unheard.send(Stage(run_id=RUN, role="actor-1", stage="idle", detail=""))
    for endpoint in (hub, spoke, unheard):
        assert ends_soon(lambda endpoint=endpoint: endpoint.close(flush_s))


def test_close_without_a_hub_never_hangs(endpoints):
    spoke = endpoints.spoke()
    spoke.send(hello())
    assert ends_soon(lambda: spoke.close(flush_s=BRIEFLY_S))


# --------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770, 0o500])
def test_a_folder_that_is_not_private_is_refused(folder, mode):
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(ValueError, match="not a private folder"):
        address(shared, "hub")


def test_a_folder_of_somebody_else_is_refused(folder, monkeypatch):
    monkeypatch.setattr(transport.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ValueError, match="not a private folder"):
        address(folder, "hub")


def test_a_path_is_refused_where_the_system_would_refuse_it(folder):
    room = transport.MAX_SOCKET_PATH_BYTES - len(str(folder)) - 1
    Hub(address(folder, "x" * room), RUN).close()
    with pytest.raises(ValueError, match="longer than a socket path"):
        address(folder, "x" * (room + 1))
    with pytest.raises(ValueError, match="longer than a socket path"):
        address(folder, "ü" * (room // 2 + 1))  # bytes count, not characters

"""The only module that knows ZeroMQ: messages between processes over Unix sockets in a private folder.

A :class:`Hub` (ROUTER) speaks to named peers, a :class:`Spoke` (DEALER) to its hub. Every wait has a deadline.
What cannot be decoded or belongs to another run is counted in ``dropped``, logged, and never reaches the caller.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import Counter
from pathlib import Path

import zmq

from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import Message
from oatlite.messages.codec import MAX_FRAMES, decode, encode
from oatlite.messages.fields import MAX_FRAME_BYTES, MalformedMessage

log = logging.getLogger(__name__)

MAX_SOCKET_PATH_BYTES = 107
QUEUE_LENGTH = 64
SEND_TIMEOUT_S = 30.0


def address(folder: Path, name: str) -> str:
    """The address of hub ``name`` in ``folder``, which must be private (0700) and have a short path."""
    path = folder / name
    mode = folder.stat().st_mode
    if stat.S_IMODE(mode) != 0o700 or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} is not a private folder of this user")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"{path} is longer than a socket path may be ({MAX_SOCKET_PATH_BYTES} bytes)")
    return f"ipc://{path}"


class _Endpoint:
    def __init__(self, kind: int, run_id: str) -> None:
        self._run_id = run_id
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDTIMEO, round(SEND_TIMEOUT_S * 1000))
        self.dropped: Counter[str] = Counter()

    def _receive_frames(self, timeout_s: float) -> list[bytes] | None:
        if not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        frames: list[bytes] = self._socket.recv_multipart()
        return frames

    def _decode(self, frames: list[bytes], sender: str) -> Message | None:
        try:
            if len(frames) > MAX_FRAMES:
                raise MalformedMessage(f"{len(frames)} frames")
            message = decode(frames)
        except MalformedMessage as error:
            self.drop("malformed", sender, str(error))
            return None
        if message.run_id != self._run_id:
            self.drop("foreign", sender, type(message).__name__)
            return None
        return message

    def close(self, flush_s: float = 0.0) -> None:
        """Close the socket; what is still queued has ``flush_s`` to leave."""
        self._socket.close(linger=round(flush_s * 1000))
        self._context.term()

    def drop(self, why: str, sender: str, what: str) -> None:
        """Count and log a message that is not used."""
        self.dropped[why] += 1
        plain = sender.encode("unicode_escape").decode()
        log.warning("dropped a %s message from %s: %s (%d so far)", why, plain, what, self.dropped[why])


class Hub(_Endpoint):
    """Binds ``address`` and exchanges messages with peers by name. A peer that comes back takes its name over."""

    def __init__(self, address: str, run_id: str) -> None:
        super().__init__(zmq.ROUTER, run_id)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(address)

    def send(self, peer: str, message: Message) -> None:
        """Raises MalformedMessage for a message over its limits, WorkerDied when the peer is not connected."""
        frames = encode(message)
        try:
            self._socket.send_multipart([peer.encode(), *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise WorkerDied(f"{peer} is not connected") from None
            if error.errno == zmq.EAGAIN:
                raise DeadlineExceeded(f"{peer} has not taken a message for {SEND_TIMEOUT_S:.0f} s") from None
            raise

    def receive(self, timeout_s: float) -> tuple[str, Message] | None:
        """The next message and its sender; None when ``timeout_s`` passed without one."""
        deadline = time.monotonic() + timeout_s
        while True:
            frames = self._receive_frames(deadline - time.monotonic())
            if frames is None:
                return None
            peer = frames[0].decode("ascii", "replace")
            message = self._decode(frames[1:], peer)
            if message is not None:
                return peer, message
            if time.monotonic() >= deadline:  # a flood of what is dropped must not keep the caller
                return None


class Spoke(_Endpoint):
    """Connects to the hub at ``address`` under ``name``."""

    def __init__(self, address: str, name: str, run_id: str) -> None:
        super().__init__(zmq.DEALER, run_id)
        self._socket.setsockopt(zmq.IDENTITY, name.encode("ascii"))
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        """Raises MalformedMessage for a message over its limits, DeadlineExceeded when the hub takes nothing."""
        try:
            self._socket.send_multipart(encode(message), copy=False)
        except zmq.Again:
            raise DeadlineExceeded(f"the hub has not taken a message for {SEND_TIMEOUT_S:.0f} s") from None

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None when ``timeout_s`` passed without one."""
        deadline = time.monotonic() + timeout_s
        while True:
            frames = self._receive_frames(deadline - time.monotonic())
            if frames is None:
                return None
            message = self._decode(frames, "the hub")
            if message is not None:
                return message
            if time.monotonic() >= deadline:
                return None

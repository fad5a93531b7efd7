"""Spoiled frames into live sockets of two processes, among real messages that must arrive.

This process holds a real spoke of the other's hub, a stranger's raw socket to the same hub, and a raw hub to which the
other's spoke connects. As a script it is the other process: it answers real messages and prints what it saw.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from fuzz_frames import RUN, Frames, fault_of, frames_of, spoiled

from oatlite.messages import Message, Record
from oatlite.transport import Hub, Spoke, address

REAL_EVERY = 10
NEW_STRANGER_EVERY = 500
DEADLINE_S = 60.0
LOST_S = 30.0
"""What has not arrived so long after the end is taken for lost."""
END = "the end"
SAMPLES = 40
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """``answered`` of ``asked`` real messages; frames ``sent`` by strangers, of which the other process dropped some
    and took others for valid messages; the first ``faults`` of those; and its ``memory`` in bytes over time."""

    sent: int
    asked: int
    answered: int
    dropped: dict[str, int]
    taken: int
    faults: list[str]
    memory: list[int]


def note(text: str) -> Record:
    return Record(run_id=RUN, kind="note", body=text)


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def live(generator: random.Random, originals: list[Frames], num_frames: int) -> Live:
    """Half of the frames to a hub, half to a spoke. Raises TimeoutError where a real message gets no answer."""
    with tempfile.TemporaryDirectory(prefix="oatlite-fuzz-", dir="/tmp") as name:
        folder = Path(name)
        command = [sys.executable, __file__, str(folder), str(num_frames)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            asked, answered = _talk(generator, originals, num_frames, folder)
            output, _ = other.communicate(timeout=DEADLINE_S)
        finally:
            other.kill()
            other.wait()
    if other.returncode:
        raise ChildProcessError(f"the other process ended with {other.returncode}")
    return Live(sent=num_frames, asked=asked, answered=answered, **json.loads(output))


def _talk(generator: random.Random, originals: list[Frames], num_frames: int, folder: Path) -> tuple[int, int]:
    context = zmq.Context()
    spoke, raw_hub = Spoke(address(folder, "hub"), "actor-0", RUN), context.socket(zmq.ROUTER)
    raw_hub.setsockopt(zmq.ROUTER_MANDATORY, 1)
    raw_hub.setsockopt(zmq.RCVTIMEO, round(DEADLINE_S * 1000))
    raw_hub.setsockopt(zmq.SNDTIMEO, round(DEADLINE_S * 1000))
    raw_hub.bind(address(folder, "raw"))
    peer, *_ = raw_hub.recv_multipart()  # the other's spoke says that it is there
    strangers: list[zmq.Socket[bytes]] = []  # open until all is read: with a connection goes what nobody has read yet
    asked = answered = 0
    try:
        for i in range(num_frames):
            if i % NEW_STRANGER_EVERY == 0:
                strangers.append(_stranger(context, folder, generator))
            _, frames = spoiled(generator, originals)
            if i % 2:
                strangers[-1].send_multipart(frames)
            else:
                raw_hub.send_multipart([peer, *frames])
            if i % REAL_EVERY == 0:
                asked += 2
                question = note(f"question {i} {generator.random()}")
                spoke.send(question)
                raw_hub.send_multipart([peer, *frames_of(question)])
                answered += spoke.receive(DEADLINE_S) == question
                answered += raw_hub.recv_multipart() == [peer, *frames_of(question)]
        spoke.send(note(END))
        raw_hub.send_multipart([peer, *frames_of(note(END))])
        # The other must have read it all before these sockets go.
        if spoke.receive(DEADLINE_S) is None:
            raise TimeoutError("the end was not noticed")
        raw_hub.recv_multipart()
    except zmq.Again:
        raise TimeoutError(f"no answer after {i} frames") from None
    finally:
        spoke.close()
        for raw in (raw_hub, *strangers):
            raw.close(linger=0)
        context.term()
    return asked, answered


def _stranger(context: zmq.Context[Any], folder: Path, generator: random.Random) -> zmq.Socket[bytes]:
    """A socket under a name of random bytes."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"s" + generator.randbytes(generator.randint(1, 40)))
    socket.setsockopt(zmq.SNDTIMEO, round(DEADLINE_S * 1000))
    socket.connect(address(folder, "hub"))
    return socket


# --------------------------------------------------------------------------- the other process


class Other:
    """Answers real messages by themselves, and judges what else comes through."""

    def __init__(self, folder: Path, num_frames: int) -> None:
        self._hub = Hub(address(folder, "hub"), RUN)
        self._spoke = Spoke(address(folder, "raw"), "learner-0", RUN)
        self._num_frames = num_frames
        self._sample_every = max(1, 2 * (num_frames // REAL_EVERY) // SAMPLES)
        self._num_real = 0
        self._taken = 0
        self._faults: list[str] = []
        self._memory: list[int] = []

    def run(self) -> dict[str, Any]:
        self._spoke.send(note("hello"))
        open_ends = 2
        while open_ends:
            open_ends -= self._answer(0.001)
        deadline = time.monotonic() + LOST_S  # strangers have connections of their own, and may be late
        while self._num_seen() < self._num_frames and time.monotonic() < deadline:
            self._answer(0.001)
        self._hub.send("actor-0", note(END))
        self._spoke.send(note(END))
        dropped = Counter(self._hub.dropped) + Counter(self._spoke.dropped)
        for endpoint in (self._hub, self._spoke):
            endpoint.close(flush_s=DEADLINE_S)
        return {"dropped": dropped, "taken": self._taken, "faults": self._faults[:5], "memory": self._memory}

    def _answer(self, timeout_s: float) -> int:
        """Take what is there from each socket; returns how many ends came."""
        ends = 0
        received = self._hub.receive(timeout_s)
        if received is not None:
            ends += self._is_end(received[1], is_real=received[0] == "actor-0", peer=received[0])
        message = self._spoke.receive(timeout_s)
        if message is not None:
            is_real = isinstance(message, Record) and message.kind == "note"
            ends += self._is_end(message, is_real=is_real, peer=None)
        return ends

    def _num_seen(self) -> int:
        return self._taken + self._hub.dropped.total() + self._spoke.dropped.total()

    def _is_end(self, message: Message, *, is_real: bool, peer: str | None) -> bool:
        if not is_real:
            self._taken += 1
            fault = fault_of(message)
            if fault is not None:
                self._faults.append(fault)
            return False
        if self._num_real % self._sample_every == 0:
            self._memory.append(memory_bytes())
        self._num_real += 1
        if message == note(END):
            return True
        if peer is None:
            self._spoke.send(message)
        else:
            self._hub.send(peer, message)
        return False


if __name__ == "__main__":
    logging.getLogger("oatlite").setLevel(logging.ERROR)  # a warning for each of thousands
    print(json.dumps(Other(Path(sys.argv[1]), int(sys.argv[2])).run()))

"""Messages between two processes through pipes: what a weight sync is timed over where ZeroMQ may be missing."""

from __future__ import annotations

import select
import struct
import time
from typing import BinaryIO

from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import Message
from oatlite.messages.codec import decode, encode


class Wire:
    """One end; ``reading`` must not be buffered."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO) -> None:
        self._reading = reading
        self._writing = writing

    def send(self, message: Message) -> None:
        frames = [bytes(frame) for frame in encode(message)]
        sizes = struct.pack(f"<{len(frames) + 1}Q", len(frames), *map(len, frames))
        self._writing.write(sizes + b"".join(frames))
        self._writing.flush()

    def receive(self, timeout_s: float) -> Message:
        """Raises DeadlineExceeded, and WorkerDied where the other end is gone."""
        deadline = time.monotonic() + timeout_s
        (count,) = struct.unpack("<Q", self._exactly(8, deadline))
        sizes = struct.unpack(f"<{count}Q", self._exactly(8 * count, deadline))
        return decode([self._exactly(size, deadline) for size in sizes])

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts = b""
        while len(parts) < size:
            if not select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise DeadlineExceeded("the other process has not answered in time")
            part = self._reading.read(size - len(parts))
            if not part:
                raise WorkerDied("the other process has ended")
            parts += part
        return parts

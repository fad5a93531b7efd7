"""A worker's line to the supervisor: its stage as a heartbeat, records for people, and last words."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from oatlite.errors import DeadlineExceeded, OatliteError, as_storage_error
from oatlite.messages import Failure, Message, Record, Stage
from oatlite.messages.fields import MalformedMessage
from oatlite.transport import Spoke, address
from oatlite.workers.spec import CONTROL_SOCKET, WorkerSpec

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
EXIT_ORPHANED = 3


class Lifeline:
    """Owns a socket and a thread, so that a worker busy in one long call still shows that its process is alive.

    A worker whose supervisor is gone ends at the next heartbeat.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._run_id = spec.run_id
        self._role = spec.role
        self._address = address(spec.private_dir, CONTROL_SOCKET)
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._stage = ("starting", "")
        self._supervisor = spec.supervisor
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        spoke = Spoke(self._address, self._role, self._run_id)
        spoke.send(self._beat())
        while True:
            try:
                message = self._outbox.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                message = self._beat()
            if message is None:
                break
            if os.getppid() != self._supervisor:  # killed, and the reaper with it, or it would have come first
                os._exit(EXIT_ORPHANED)
            # A supervisor that is stopped takes nothing for a while; it must find this worker alive when it goes on.
            with contextlib.suppress(DeadlineExceeded):
                self._send(spoke, message)
        spoke.close(flush_s=5.0)

    def _send(self, spoke: Spoke, message: Message) -> None:
        try:
            spoke.send(message)
        except MalformedMessage as error:  # too long; signs of life must go on all the same
            log.warning("a %s cannot be sent: %s", type(message).__name__, error)

    def _beat(self) -> Stage:
        stage, detail = self._stage
        return Stage(run_id=self._run_id, role=self._role, stage=stage, detail=detail)

    def stage(self, stage: str, detail: str = "") -> None:
        """Say what this worker does from now on."""
        self._stage = (stage, detail)
        self._outbox.put(self._beat())

    @contextmanager
    def doing(self, stage: str, detail: str = "") -> Iterator[None]:
        """The stage for the length of a block, then back to the one before."""
        before = self._stage
        self.stage(stage, detail)
        try:
            yield
        finally:
            self.stage(*before)

    def record(self, kind: str, body: dict[str, Any]) -> None:
        self._outbox.put(Record(run_id=self._run_id, kind=kind, body=json.dumps(body)))

    def fail(self, error: BaseException) -> int:
        """Send last words; returns the exit code that the process should end with."""
        known = error if isinstance(error, OatliteError) else as_storage_error(error)
        if known is not None:
            code, message, fix = known.exit_code, known.message, known.fix
        else:
            code, message, fix = 3, f"{type(error).__name__}: {error}", ""
        message, fix = (text.encode(errors="replace").decode() for text in (message, fix))  # of a path that is no text
        self._outbox.put(
            Failure(run_id=self._run_id, role=self._role, exit_code=code, message=message[:2000], fix=fix[:2000])
        )
        self.close()
        return code

    def close(self) -> None:
        self._outbox.put(None)
        self._thread.join(timeout=10)

"""What the server's processes are told at their start.

Apart from :mod:`oatlite.oracles.server`, because Mosec reads the command line when it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SETTINGS = "OATLITE_SERVER_SETTINGS"
NOTES = "OATLITE_SERVER_NOTES"
TOKEN = "OATLITE_ORACLE_TOKEN"
READY, FAILED = "ready-", "failed-"
"""Notes of workers, each with the worker's index after it."""

SCORES, NEEDS_REFERENCES = "scores", "needs-references"
"""Words in the note of a worker that is ready: its oracle gives rewards, it answers nobody without references."""

QUEUE = 1024
"""More requests than these at once are told 429."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What worker ``index`` loads and where: ``device`` is "cpu", "cuda", or "auto" for all that it sees.

    ``mask`` is its CUDA_VISIBLE_DEVICES, and ``notes`` the folder where it leaves word of how its start went.
    """

    index: int
    device: str
    mask: str
    threads: int
    oracle: dict[str, Any]
    notes: str

    def environment(self) -> dict[str, str]:
        """The variables of the worker's process; those for which it is too late once it runs are among them."""
        return {
            SETTINGS: json.dumps(asdict(self)),
            TOKEN: "",  # the gate alone needs it
            "CUDA_VISIBLE_DEVICES": self.mask,
            "OMP_NUM_THREADS": str(self.threads),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How Mosec listens and batches; ``folder`` is for its sockets."""

    address: str
    port: int
    timeout_s: float
    max_request_bytes: int
    max_batch: int
    max_wait_ms: int
    folder: str
    workers: list[WorkerSettings]

    @classmethod
    def read(cls, text: str) -> ServerSettings:
        values = json.loads(text)
        return cls(**values | {"workers": [WorkerSettings(**worker) for worker in values["workers"]]})

    def mosec_arguments(self) -> list[str]:
        """For Mosec, which reads the command line itself."""
        return [
            *("--path", self.folder, "--address", self.address, "--port", str(self.port)),
            *("--timeout", str(round(1000 * self.timeout_s)), "--capacity", str(QUEUE)),
            *("--max-request-size", str(self.max_request_bytes)),
            *("--namespace", "oatlite_oracle", "--log-level", "warning"),
        ]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """``inherited`` without settings of Mosec's, but that of its log, which it reads before we can give it."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("MOSEC_")}
    return kept | {"MOSEC_LOG_LEVEL": "warning"}

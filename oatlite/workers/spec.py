"""What the supervisor tells a worker process: one JSON file in the run's private folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from oatlite.config.placement import actors_of_rank
from oatlite.config.schema import Config

CONTROL_SOCKET = "control"
STOP_SIGNAL = signal.SIGUSR2
"""Asks a learner rank that is past its start to finish its step, save a checkpoint and end."""
END_SIGNAL = signal.SIGHUP
"""Ends a worker at once. SIGTERM does not: whoever sends that to all processes of a run means the supervisor, which has
the step saved first."""
EXIT_FINISHED = 64
"""How a worker ends whose work is done. Not 0: a library that ends the process in the middle of it may say that."""


class WorkerSpec(BaseModel):
    """Lengths in tokens, steps and ``fingerprints`` are what the preflight found (``num_steps`` those that the learning
    rate is planned for); ``device`` is ``cpu`` or
    ``cuda``, of which the worker sees one, and an actor's engine takes ``engine_share`` (with ``gpu_lock``, a
    file, other processes are there too); ``resume_from`` is the folder
    of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    supervisor: int = Field(default_factory=os.getpid, description="process that starts the worker")
    kind: Literal["learner", "actor"]
    index: int
    run_dir: Path
    private_dir: Path
    device: Literal["cpu", "cuda"]
    threads: int
    longest_prompt: int
    longest_response: int
    num_steps: int
    most_steps: int
    fingerprints: dict[str, str]
    engine_share: float | None = None
    gpu_lock: Path | None = None
    resume_from: Path | None = None
    config: Config

    @property
    def max_model_len(self) -> int:
        return self.longest_prompt + self.longest_response

    @property
    def role(self) -> str:
        return role_name(self.kind, self.index)

    @property
    def turn_s(self) -> float:
        """Longer than the others on its GPU may hold it, one after the other."""
        return self.config.timeouts.learn_s + int(self.config.placement.actors or 1) * self.config.timeouts.start_s

    def learner_of(self, actor: int) -> int:
        """Actor i serves rank i mod ranks."""
        return actor % int(self.config.placement.learners or 1)

    def actors_of(self, rank: int) -> list[str]:
        return [role_name("actor", actor) for actor in actors_of_rank(self.config, rank)]

    def write(self) -> Path:
        path = self.private_dir / f"{self.kind}-{self.index}.json"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self.model_dump_json())
        return path


def role_name(kind: str, index: int) -> str:
    return f"{kind}-{index}"


def rollout_socket(rank: int) -> str:
    return f"rollout-{rank}"

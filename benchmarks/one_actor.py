"""A learner's end with one real actor process behind it, for what needs no learner."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from oatlite.config.schema import Config
from oatlite.launcher import LocalLauncher, Worker
from oatlite.transport import Hub, address
from oatlite.weights import SHM_PREFIX, Layout, WeightExporter, create_buffer
from oatlite.workers.rollout import ActorPool, Deadlines
from oatlite.workers.spec import END_SIGNAL, WorkerSpec, rollout_socket


@contextmanager
def one_actor(
    policy: Path,
    reward_model: Path,
    layout: Layout,
    vocab_size: int,
    logs: Path,
    *,
    max_model_len: int = 64,
    lora: dict[str, Any] | None = None,
    more: dict[str, dict[str, Any]] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    module: str = "oatlite.workers",
) -> Iterator[ActorPool]:
    """An actor, in float32 on CPU if nothing else is said, ready to be synced; its log is ``logs/actor.log``.

    ``more`` are sections of its configuration, ``module`` is what runs it. On a GPU weights go by CUDA IPC.
    """
    options = {"max_model_len": max_model_len, "lora": lora, "more": more, "device": device, "module": module}
    with startable_actor(policy, reward_model, layout, vocab_size, logs, **options) as (pool, start):
        start()
        pool.wait_until_ready()
        yield pool
        pool.stop()


@contextmanager
def startable_actor(
    policy: Path,
    reward_model: Path,
    layout: Layout,
    vocab_size: int,
    logs: Path,
    *,
    max_model_len: int,
    lora: dict[str, Any] | None,
    more: dict[str, dict[str, Any]] | None,
    device: Literal["cpu", "cuda"] = "cpu",
    module: str = "oatlite.workers",
) -> Iterator[tuple[ActorPool, Callable[[], Worker]]]:
    """As :func:`one_actor`, with what starts the actor, or another one in its place."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(policy), "dtype": "float32"},
        "oracle": {"path": str(reward_model), "dtype": "float32"},
        "lora": lora or {},
    }
    for section, values in (more or {}).items():
        settings[section] = settings.get(section, {}) | values
    config = Config.model_validate(settings)
    with LocalLauncher(SHM_PREFIX) as launcher:
        spec = WorkerSpec(
            run_id=launcher.run_id,
            kind="actor",
            index=0,
            run_dir=logs,
            private_dir=launcher.private_dir,
            device=device,
            threads=len(os.sched_getaffinity(0)),
            longest_prompt=max_model_len - 1,
            longest_response=1,
            num_steps=1,
            most_steps=1,
            fingerprints={},
            engine_share=config.placement.gpu_memory_utilization,
            config=config,
        )
        buffer = create_buffer(
            "shm" if device == "cpu" else "cuda_ipc", layout.buffer_bytes, launcher.run_id, torch.device(device)
        )
        hub = Hub(address(launcher.private_dir, rollout_socket(0)), launcher.run_id)
        deadlines = Deadlines(start_s=300, generate_s=120, oracle_s=60, sync_s=300)
        pool = ActorPool(hub, [spec.role], launcher.run_id, deadlines, WeightExporter(layout, buffer), vocab_size)
        environment = os.environ | {"TMPDIR": str(launcher.private_dir), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", module, str(spec.write())]
        yield (
            pool,
            lambda: launcher.start(command, environment, logs / "actor.log", end_signal=END_SIGNAL),
        )
        pool.close()

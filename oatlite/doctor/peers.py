"""The two processes of the trial: a learner and an actor that speak as those of a run do, for a few seconds.

``python -m oatlite.doctor.peers ROLE FOLDER RUN_ID``. The learner writes what it sees to its output, a line of JSON
each: first ``torch``, then a line per transport.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from oatlite.errors import DeadlineExceeded, OatliteError, WorkerDied
from oatlite.messages import (
    BucketLoaded,
    BucketReady,
    CudaIpcHandle,
    Failure,
    FeatureBatch,
    Hello,
    Message,
    ShmHandle,
    Stop,
    WeightManifest,
)
from oatlite.messages.fields import MalformedMessage
from oatlite.transport import Hub, Spoke, address
from oatlite.weights import WeightExporter, WeightReader, create_buffer, plan_layout

SOCKET = "trial"
ACTOR = "actor-0"
START_S = 120.0
TRIAL_S = 10.0
NUM_FEATURES = 1 << 20
MATRICES = [(f"layers.{layer}.weight", (512, 512)) for layer in range(8)]
BUCKET_BYTES = 3 << 20  # of a megabyte each, so that buckets take turns in both slots

M = TypeVar("M", bound=Message)


def learner(folder: Path, run_id: str) -> None:
    """Try each transport with the actor, and tell how it went."""
    _tell("torch", **_view())
    hub = Hub(address(folder, SOCKET), run_id)
    _expect(Hello, hub, time.monotonic() + START_S)
    _try("messages", lambda: _round_trip(hub, run_id))
    _try("weights-shm", lambda: _sync(hub, run_id, "shm", torch.device("cpu")))
    if torch.cuda.is_available():
        _try("weights-cuda-ipc", lambda: _sync(hub, run_id, "cuda_ipc", torch.device("cuda", 0)))
    hub.send(ACTOR, Stop(run_id=run_id))
    hub.close(flush_s=1.0)


def actor(folder: Path, run_id: str) -> None:
    """Answer until told to stop."""
    spoke = Spoke(address(folder, SOCKET), ACTOR, run_id)
    spoke.send(Hello(run_id=run_id, role=ACTOR, pid=os.getpid()))
    manifest: WeightManifest | None = None
    reader: WeightReader | None = None
    while True:
        message = spoke.receive(START_S)
        try:
            match message:
                case None | Stop():
                    break
                case FeatureBatch():
                    spoke.send(message)
                case WeightManifest():
                    manifest = message
                case ShmHandle() | CudaIpcHandle() if manifest is not None:
                    reader = WeightReader(manifest, message)
                case BucketReady(version=version, bucket=bucket) if reader is not None:
                    _, checksum = reader.read(bucket)
                    spoke.send(
                        BucketLoaded(run_id=run_id, version=version, bucket=bucket, checksum=checksum, load_s=0.0)
                    )
        except (OatliteError, MalformedMessage, OSError, RuntimeError) as error:  # torch raises the last
            words = f"the actor: {_words(error)}"[:2000]
            spoke.send(Failure(run_id=run_id, role=ACTOR, exit_code=3, message=words, fix=""))
    spoke.close(flush_s=1.0)


def _view() -> dict[str, Any]:
    """What torch sees of this machine."""
    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    apart = [
        (first, second)
        for first, second in permutations(indices, 2)
        if not torch.cuda.can_device_access_peer(first, second)
    ]
    devices = []
    for index in indices:
        free, total = torch.cuda.mem_get_info(index)
        devices.append((str(torch.cuda.get_device_properties(index).uuid), total, free))
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices,
        "apart": sorted({(min(pair), max(pair)) for pair in apart}),
    }


def _try(name: str, trial: Callable[[], str]) -> None:
    started = time.monotonic()
    try:
        detail = trial()
    except (OatliteError, MalformedMessage, OSError, RuntimeError) as error:  # torch raises the last
        _tell(name, error=_words(error))
    else:
        _tell(name, detail=f"{detail} in {1000 * (time.monotonic() - started):.0f} ms")


def _words(error: Exception) -> str:
    if isinstance(error, OatliteError):
        return error.message
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _tell(name: str, **values: Any) -> None:
    print(json.dumps({"name": name, **values}), flush=True)


def _round_trip(hub: Hub, run_id: str) -> str:
    """A batch of numbers to the actor and back, compared."""
    features = np.random.default_rng(0).standard_normal(NUM_FEATURES, dtype=np.float32)
    hub.send(ACTOR, FeatureBatch(run_id=run_id, batch_id="trial", features=features, num_features=1024, encode_s=0.0))
    answer = _expect(FeatureBatch, hub, time.monotonic() + TRIAL_S)
    if not np.array_equal(answer.features, features):
        raise WorkerDied("what came back over ZeroMQ is not what was sent")
    return f"{features.nbytes >> 20} MiB there and back over ZeroMQ"


def _sync(hub: Hub, run_id: str, transport: str, device: torch.device) -> str:
    """A version of weights through a shared buffer, bucket by bucket, by the checksums of both ends."""
    deadline = time.monotonic() + TRIAL_S
    layout = plan_layout(MATRICES, torch.float32, BUCKET_BYTES)
    exporter = WeightExporter(layout, create_buffer(transport, layout.buffer_bytes, run_id, device))
    generator = torch.Generator(device).manual_seed(0)
    try:
        hub.send(ACTOR, layout.manifest(run_id))
        hub.send(ACTOR, exporter.handle(run_id))
        for bucket in range(layout.num_buckets):
            tensors = {
                placement.name: torch.randn(placement.shape, generator=generator, device=device)
                for placement in layout.bucket(bucket)
            }
            checksum = exporter.fill(bucket, tensors.__getitem__)
            is_last = bucket == layout.num_buckets - 1
            hub.send(ACTOR, BucketReady(run_id=run_id, version=1, bucket=bucket, is_last=is_last, checksum=checksum))
            loaded = _expect(BucketLoaded, hub, deadline)
            if (loaded.bucket, loaded.checksum) != (bucket, checksum):
                raise WorkerDied(f"bucket {bucket} was read with another checksum than it was written with")
    finally:
        exporter.close()
    num_bytes = sum(placement.num_bytes for placement in layout.placements)
    return f"{num_bytes >> 20} MiB in {layout.num_buckets} buckets, checksums equal,"


def _expect(kind: type[M], hub: Hub, deadline: float) -> M:
    """The next message of that kind. Raises DeadlineExceeded, and WorkerDied with what the actor says went wrong."""
    while (received := hub.receive(deadline - time.monotonic())) is not None:
        _, message = received
        if isinstance(message, kind):
            return message
        if isinstance(message, Failure):
            raise WorkerDied(message.message)
    raise DeadlineExceeded("no answer from the other process in time")


if __name__ == "__main__":
    {"learner": learner, "actor": actor}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])

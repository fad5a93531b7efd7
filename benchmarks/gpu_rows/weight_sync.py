"""Weights from one process to another on the same device, by both ends of :mod:`oatlite.weights`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_rows.reading_end import fingerprint
from gpu_rows.scale import Scale, Tell, memory_bytes
from gpu_rows.timing import copy_seconds
from gpu_rows.wire import Wire
from oatlite.errors import ConfigError, WorkerDied
from oatlite.messages import BucketLoaded, BucketReady, Hello, Record, Stop
from oatlite.weights import CudaIpcBuffer, WeightExporter, create_buffer, plan_layout

START_S, SYNC_S = 120.0, 60.0
NUM_SYNCS = 50
SETTLED = 5  # syncs after which memory has to be flat
MOST_COPIES = 10.0
MOST_S = 0.1
FLAT_BYTES = 4 << 20
RUN = "gpu-bench"


@contextmanager
def reading_end(scale: Scale) -> Iterator[tuple[Wire, int]]:
    """The other process, and its number."""
    command = [sys.executable, "-m", "gpu_rows.reading_end", scale.device]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None and process.stdout is not None
    try:
        wire = Wire(process.stdout, process.stdin)
        if not isinstance(wire.receive(START_S), Hello):
            raise WorkerDied("the reading end did not say hello")
        yield wire, process.pid
        process.wait(SYNC_S)
    finally:
        process.kill()
        process.wait()


def random_weights(scale: Scale) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    placed: dict[str, Any] = {"device": scale.place(), "dtype": scale.dtype()}
    return {name: torch.randn(shape, **placed) for name, shape in scale.parameter_shapes()}


class Sender:
    """The learner's end over a pipe, in the order of :class:`oatlite.workers.rollout.ActorPool`: a bucket is filled
    while the one before is loaded."""

    def __init__(self, exporter: WeightExporter, wire: Wire) -> None:
        self._exporter = exporter
        self._wire = wire
        wire.send(exporter.layout.manifest(RUN))
        wire.send(exporter.handle(RUN))

    def sync(self, version: int, weights: dict[str, torch.Tensor]) -> float:
        """Returns the seconds that the other end spent on its own copy. Raises WorkerDied for other bytes."""
        count = self._exporter.layout.num_buckets
        checksums: list[str] = []
        load_s = 0.0
        for bucket in range(count):
            checksums.append(self._exporter.fill(bucket, weights.__getitem__))
            if bucket:
                load_s += self._acknowledged(version, bucket - 1, checksums[bucket - 1])
            is_last = bucket == count - 1
            self._wire.send(
                BucketReady(run_id=RUN, version=version, bucket=bucket, is_last=is_last, checksum=checksums[bucket])
            )
        return load_s + self._acknowledged(version, count - 1, checksums[-1])

    def _acknowledged(self, version: int, bucket: int, checksum: str) -> float:
        answer = self._wire.receive(SYNC_S)
        wanted = (version, bucket, checksum)
        if not isinstance(answer, BucketLoaded) or (answer.version, answer.bucket, answer.checksum) != wanted:
            raise WorkerDied(f"bucket {bucket} of weights {version} was read with other bytes than were written")
        return answer.load_s

    def stop(self) -> str:
        """The fingerprint of the weights that the other end holds."""
        self._wire.send(Stop(run_id=RUN))
        answer = self._wire.receive(SYNC_S)
        assert isinstance(answer, Record)
        return str(json.loads(answer.body)["fingerprint"])


def weight_sync(scale: Scale, tell: Tell) -> None:
    weights = random_weights(scale)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    copy_s = copy_seconds(scale, num_bytes)
    tell("plain copy", f"{num_bytes / 1e9:.3f} GB in {1e3 * copy_s:.2f} ms", copy_s=copy_s, num_bytes=num_bytes)
    for bucket_bytes in (60_000 if scale.tiny else 256 << 20, num_bytes + (64 << 20)):
        _timed_syncs(scale, tell, weights, bucket_bytes, copy_s)


def _timed_syncs(scale: Scale, tell: Tell, weights: dict[str, torch.Tensor], bucket_bytes: int, copy_s: float) -> None:
    layout = plan_layout([(n, tuple(w.shape)) for n, w in weights.items()], scale.dtype(), bucket_bytes)
    exporter = WeightExporter(layout, create_buffer(scale.transport, layout.buffer_bytes, RUN, scale.place()))
    totals, loads, held = [], [], []
    try:
        with reading_end(scale) as (wire, pid):
            sender = Sender(exporter, wire)
            for version in range(1, NUM_SYNCS + 1):
                next(iter(weights.values())).view(-1)[0] = version  # each version has bytes of its own
                scale.synchronize()
                start = time.perf_counter()
                load_s = sender.sync(version, weights)
                totals.append(time.perf_counter() - start)
                loads.append(load_s)
                held.append(memory_bytes(scale, [pid, os.getpid()]))
            is_equal = sender.stop() == fingerprint(weights)
    finally:
        exporter.close()
    total_s, load_s = statistics.median(totals[SETTLED:]), statistics.median(loads[SETTLED:])
    transfer_s = statistics.median(t - one for t, one in zip(totals[SETTLED:], loads[SETTLED:], strict=True))
    grown = held[-1] - held[SETTLED]
    what = f"{scale.transport}, {layout.num_buckets} bucket{'s' if layout.num_buckets > 1 else ''}"
    numbers = {
        "buckets": layout.num_buckets,
        "total_s": total_s,
        "load_s": load_s,
        "transfer_s": transfer_s,
        "copy_s": copy_s,
        "first_s": totals[0],
        "slowest_s": max(totals[SETTLED:]),
    }
    copies = transfer_s / copy_s
    tell(
        what,
        f"{1e3 * total_s:.2f} ms in all, {1e3 * load_s:.2f} of them the reader's own copy; transfer {copies:.1f} "
        f"copies, {copy_s / transfer_s:.0%} of the copy's bandwidth",
        is_met=None if scale.tiny else copies <= MOST_COPIES and total_s <= MOST_S,
        **numbers,
    )
    tell(
        f"{NUM_SYNCS} syncs",
        f"memory {grown / 2**20:+.2f} MiB since the {SETTLED}th; the reader's weights "
        f"{'equal' if is_equal else 'DIFFER FROM'} the sender's, to the bit",
        is_met=is_equal and grown <= FLAT_BYTES,
        grown_bytes=grown,
        is_equal=is_equal,
    )


def refusal(scale: Scale, tell: Tell) -> None:
    """Runs with expandable segments switched on: no buffer is made, and the message says what to do."""
    try:
        CudaIpcBuffer(1 << 20, scale.place())
    except ConfigError as error:
        tell("our buffer", f"refused: {error.message}; {error.fix}", is_met="expandable_segments" in error.message)
    else:
        tell("our buffer", "made, where it should have been refused", is_met=False)
    if scale.on_gpu:
        memory = torch.zeros(1 << 26, dtype=torch.uint8, device=scale.place())
        try:
            memory.untyped_storage()._share_cuda_()
        except RuntimeError as error:
            tell("torch itself", f"refuses: {str(error).splitlines()[0]}")
        else:
            tell("torch itself", "exports a handle of such memory all the same")

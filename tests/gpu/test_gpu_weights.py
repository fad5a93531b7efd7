"""Weights from one process to another by CUDA IPC, on one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from gpu_rows.scale import Scale, memory_bytes

from oatlite.errors import DeadlineExceeded, WorkerDied

if TYPE_CHECKING:
    import torch
    from gpu_rows.weight_sync import Sender

BUCKET_BYTES = 60_000
NUM_SYNCS = 50
SETTLED = 5
FLAT_BYTES = 2 << 20


@contextmanager
def sender_of(scale: Scale, weights: dict[str, torch.Tensor], bucket_bytes: int) -> Iterator[tuple[Sender, int]]:
    """A learner's end with another process behind it, and that one's number."""
    from gpu_rows.weight_sync import RUN, Sender, reading_end

    from oatlite.weights import WeightExporter, create_buffer, plan_layout

    layout = plan_layout([(n, tuple(w.shape)) for n, w in weights.items()], scale.dtype(), bucket_bytes)
    exporter = WeightExporter(layout, create_buffer(scale.transport, layout.buffer_bytes, RUN, scale.place()))
    try:
        with reading_end(scale) as (wire, pid):
            yield Sender(exporter, wire), pid
    finally:
        exporter.close()


@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 1 << 28])
def test_the_other_process_holds_each_version_to_the_bit(scale: Scale, bucket_bytes: int) -> None:
    from gpu_rows.reading_end import fingerprint
    from gpu_rows.weight_sync import random_weights

    weights = random_weights(scale)
    with sender_of(scale, weights, bucket_bytes) as (sender, _):
        for version in range(1, 4):
            for tensor in weights.values():
                tensor.add_(0.5 * version)
            sender.sync(version, weights)
        assert sender.stop() == fingerprint(weights)


def test_weights_of_another_type_are_converted_on_the_way(scale: Scale) -> None:
    from gpu_rows.reading_end import fingerprint
    from gpu_rows.weight_sync import random_weights

    weights = {name: tensor.double() for name, tensor in random_weights(scale).items()}
    with sender_of(scale, weights, BUCKET_BYTES) as (sender, _):
        sender.sync(1, weights)
        assert sender.stop() == fingerprint({name: tensor.to(scale.dtype()) for name, tensor in weights.items()})


def test_fifty_syncs_leave_memory_flat(scale: Scale) -> None:
    from gpu_rows.weight_sync import random_weights

    weights = random_weights(scale)
    held = []
    with sender_of(scale, weights, BUCKET_BYTES) as (sender, pid):
        for version in range(1, NUM_SYNCS + 1):
            sender.sync(version, weights)
            held.append(memory_bytes(scale, [pid, os.getpid()]))
        sender.stop()
    assert held[-1] - held[SETTLED] <= FLAT_BYTES


def test_a_reader_that_is_killed_takes_nothing_with_it(scale: Scale) -> None:
    """The buffer lives on, and a successor opens it by a handle of its own."""
    from gpu_rows.reading_end import fingerprint
    from gpu_rows.weight_sync import RUN, Sender, random_weights, reading_end

    from oatlite.weights import WeightExporter, create_buffer, plan_layout

    weights = random_weights(scale)
    layout = plan_layout([(n, tuple(w.shape)) for n, w in weights.items()], scale.dtype(), BUCKET_BYTES)
    exporter = WeightExporter(layout, create_buffer(scale.transport, layout.buffer_bytes, RUN, scale.place()))
    try:
        with reading_end(scale) as (wire, pid):
            sender = Sender(exporter, wire)
            sender.sync(1, weights)
            os.kill(pid, 9)
            with pytest.raises((WorkerDied, DeadlineExceeded, BrokenPipeError)):
                sender.sync(2, weights)
        with reading_end(scale) as (wire, _):
            sender = Sender(exporter, wire)
            sender.sync(3, weights)
            assert sender.stop() == fingerprint(weights)
    finally:
        exporter.close()


@pytest.mark.gpu
def test_a_buffer_within_a_larger_allocation_is_found_there(scale: Scale) -> None:
    """Torch cuts small tensors out of a block: what is shared is the block, and an offset."""
    import torch
    from gpu_rows.reading_end import fingerprint

    before = torch.ones(1000, device=scale.place(), dtype=scale.dtype())
    weights = {f"layers.{i}.weight": torch.full((3, 5), float(i), device=scale.place()) for i in range(4)}
    with sender_of(scale, weights, BUCKET_BYTES) as (sender, _):
        assert sender._exporter.handle("offset").allocation_offset > 0  # type: ignore[union-attr]
        sender.sync(1, weights)
        assert sender.stop() == fingerprint({n: w.to(scale.dtype()) for n, w in weights.items()})
    assert bool((before == 1).all())


@pytest.mark.gpu
def test_a_handle_of_a_gpu_that_is_not_here_is_refused(scale: Scale) -> None:
    import dataclasses

    from oatlite.messages import CudaIpcHandle
    from oatlite.messages.fields import MalformedMessage
    from oatlite.weights import CudaIpcBuffer, open_buffer

    buffer = CudaIpcBuffer(1 << 20, scale.place())
    handle = buffer.handle("run")
    assert isinstance(handle, CudaIpcHandle)
    elsewhere = dataclasses.replace(handle, device_uuid="00000000-0000-0000-0000-000000000000")
    with pytest.raises(MalformedMessage, match="cannot see"):
        open_buffer(elsewhere)
    buffer.close()


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_memory_that_cannot_be_shared_is_refused_with_what_to_do(setting: str, scale: Scale) -> None:
    code = (
        "import torch; from oatlite.errors import ConfigError; from oatlite.weights import CudaIpcBuffer\n"
        "try: CudaIpcBuffer(1024, torch.device('cuda', 0))\n"
        "except ConfigError as error: print(error.message, '/', error.fix)"
    )
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": setting}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"PYTORCH_CUDA_ALLOC_CONF={setting}" in done.stdout
    assert "sync.transport=shm" in done.stdout

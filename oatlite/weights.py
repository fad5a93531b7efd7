"""Both ends of weight sync: the learner lays its parameters into one shared buffer, the actor reads them there.

The buffer has one slot, or two when the model needs more than one bucket, so that a bucket is filled while the one
before is loaded. A bucket ends where a module ends: vLLM keeps what it was given until a fused layer is complete.
Who may touch a slot when is the caller's protocol (:mod:`oatlite.workers.rollout`): a slot is refilled only after
every actor has acknowledged the bucket that lay in it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import mmap
import os
import re
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from oatlite.errors import ConfigError, StorageError
from oatlite.hardware import unshareable_memory
from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
from oatlite.messages.fields import MalformedMessage

SHM_FOLDER = Path("/dev/shm")
SHM_PREFIX = "oatlite-"
ALIGNMENT_BYTES = 256
CHECKSUM_ROW_WORDS = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one tensor lies: ``offset`` is in bytes from the start of the buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bucket: int
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The first byte after it that another tensor may use."""
        return _align(self.offset + self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which tensor lies where, bucket by bucket, in a buffer of ``buffer_bytes``."""

    placements: tuple[Placement, ...]
    buffer_bytes: int

    @property
    def num_buckets(self) -> int:
        return self.placements[-1].bucket + 1

    def bucket(self, index: int) -> list[Placement]:
        return [placement for placement in self.placements if placement.bucket == index]

    def span(self, index: int) -> tuple[int, int]:
        """First byte and end of what bucket ``index`` uses of the buffer."""
        members = self.bucket(index)
        return members[0].offset, members[-1].end

    def manifest(self, run_id: str) -> WeightManifest:
        names = {dtype: name for name, dtype in DTYPES.items()}
        return WeightManifest(
            run_id=run_id,
            names=[p.name for p in self.placements],
            dtypes=[names[p.dtype] for p in self.placements],
            ndims=np.array([len(p.shape) for p in self.placements], np.int64),
            shapes=np.array([size for p in self.placements for size in p.shape], np.int64),
            buckets=np.array([p.bucket for p in self.placements], np.int64),
            offsets=np.array([p.offset for p in self.placements], np.int64),
            buffer_bytes=self.buffer_bytes,
        )

    @classmethod
    def from_manifest(cls, manifest: WeightManifest) -> Layout:
        """Raises MalformedMessage where a tensor would reach outside the buffer."""
        placements: list[Placement] = []
        ends = np.cumsum(manifest.ndims)
        for i, name in enumerate(manifest.names):
            if manifest.dtypes[i] not in DTYPES:
                raise MalformedMessage(f"tensor {name} has the unknown dtype {manifest.dtypes[i]}")
            shape = tuple(int(size) for size in manifest.shapes[ends[i] - manifest.ndims[i] : ends[i]])
            placement = Placement(
                name=name,
                shape=shape,
                dtype=DTYPES[manifest.dtypes[i]],
                bucket=int(manifest.buckets[i]),
                offset=int(manifest.offsets[i]),
            )
            if placement.offset % ALIGNMENT_BYTES or placement.end > manifest.buffer_bytes:
                raise MalformedMessage(f"tensor {name} reaches outside the buffer")
            if placements and placements[-1].bucket == placement.bucket and placement.offset < placements[-1].end:
                raise MalformedMessage(f"tensor {name} lies on the one before it")
            placements.append(placement)
        return cls(placements=tuple(placements), buffer_bytes=manifest.buffer_bytes)


def plan_layout(shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype, bucket_bytes: int) -> Layout:
    """Cut named tensors into buckets of about ``bucket_bytes`` that end on module boundaries.

    A module larger than that makes the bucket as large as itself.
    """
    modules: list[list[tuple[str, tuple[int, ...]]]] = []
    for name, shape in shapes:
        if modules and _module_of(modules[-1][-1][0]) == _module_of(name):
            modules[-1].append((name, shape))
        else:
            modules.append([(name, shape)])

    def size(module: list[tuple[str, tuple[int, ...]]]) -> int:
        return sum(_align(math.prod(shape) * dtype.itemsize) for _, shape in module)

    slot_bytes = max(bucket_bytes - bucket_bytes % ALIGNMENT_BYTES, max(size(module) for module in modules))
    placements: list[Placement] = []
    bucket, used = 0, 0
    for module in modules:
        if used and used + size(module) > slot_bytes:
            bucket, used = bucket + 1, 0
        for name, shape in module:
            offset = (bucket % 2) * slot_bytes + used
            placement = Placement(name=name, shape=shape, dtype=dtype, bucket=bucket, offset=offset)
            placements.append(placement)
            used += _align(placement.num_bytes)
    return Layout(placements=tuple(placements), buffer_bytes=2 * slot_bytes if bucket else used)


def _module_of(name: str) -> str:
    """The part of a parameter's name that must stay whole: its numbered layer, or else its module."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered.group(0) if numbered else name.rpartition(".")[0]


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def view(buffer: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The tensor at ``placement`` as a view of the byte buffer (N,)."""
    part = buffer[placement.offset : placement.offset + placement.num_bytes]
    return part.view(placement.dtype).view(placement.shape)


def checksum(data: torch.Tensor) -> str:
    """A checksum of bytes (N,), N a multiple of 8, at memory bandwidth on any device.

    Rows of 64 KiB are added up as 64-bit words, and the sums are hashed: it shows any flipped bit and any row out of
    place, and costs one read. It guards against faults of the transport, not against an attacker.
    """
    words = data.view(torch.int64)
    whole = words.numel() // CHECKSUM_ROW_WORDS * CHECKSUM_ROW_WORDS
    sums = [words[:whole].view(-1, CHECKSUM_ROW_WORDS).sum(dim=1), words[whole:].sum().view(1)]
    return hashlib.blake2b(torch.cat(sums).cpu().numpy().tobytes(), digest_size=16).hexdigest()


class SharedBuffer(ABC):
    """Bytes (N,) that another process on this machine can open by a handle."""

    data: torch.Tensor

    @abstractmethod
    def handle(self, run_id: str) -> ShmHandle | CudaIpcHandle: ...

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written is visible to other processes."""

    @abstractmethod
    def close(self) -> None: ...


class ShmBuffer(SharedBuffer):
    """POSIX shared memory: a file under /dev/shm, 0600, with an unguessable name, all of it reserved at once.

    Both ends hold a lock on it while they have it mapped, so that a segment without any is known to be a dead run's.
    """

    def __init__(self, num_bytes: int, run_id: str) -> None:
        self._path = SHM_FOLDER / f"{SHM_PREFIX}{run_id}-{secrets.token_hex(8)}"
        self._num_bytes = num_bytes
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # the mapping keeps a copy of the descriptor, and the lock with it
            os.posix_fallocate(descriptor, 0, num_bytes)
            self._map = mmap.mmap(descriptor, num_bytes)
        except OSError as error:
            self._path.unlink()
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise _shm_full(num_bytes) from None
            raise
        finally:
            os.close(descriptor)
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def handle(self, run_id: str) -> ShmHandle:
        return ShmHandle(run_id=run_id, segment=self._path.name, num_bytes=self._num_bytes)

    def flush(self) -> None:
        """Nothing to do: a finished CPU copy is visible to every mapping."""

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def _shm_full(num_bytes: int) -> StorageError:
    status = os.statvfs(SHM_FOLDER)
    free = status.f_bavail * status.f_frsize
    return StorageError(
        f"{SHM_FOLDER} has {free} bytes free and the weight buffer needs {num_bytes}",
        f"free some of {SHM_FOLDER} (what dead runs have left: oatlite doctor --clean), or lower it with --set "
        "sync.bucket_mib=64",
    )


class CudaIpcBuffer(SharedBuffer):
    """GPU memory shared through one CUDA IPC handle."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        found = unshareable_memory(os.environ)
        if found is not None:
            raise ConfigError(
                f"CUDA IPC does not work with {'='.join(found)}",
                "unset it, or use --set sync.transport=shm",
            )
        self._device = device
        self.data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def handle(self, run_id: str) -> CudaIpcHandle:
        shared = self.data.untyped_storage()._share_cuda_()
        _, memory, allocation_bytes, allocation_offset, counter, counter_offset, event, event_sync = shared
        return CudaIpcHandle(
            run_id=run_id,
            device_uuid=str(torch.cuda.get_device_properties(self._device).uuid),
            memory_handle=memory.hex(),
            allocation_bytes=allocation_bytes,
            allocation_offset=allocation_offset,
            ref_counter_handle=counter.hex(),
            ref_counter_offset=counter_offset,
            event_handle=event.hex(),
            event_sync_required=bool(event_sync),
            num_bytes=self.data.numel(),
        )

    def flush(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


def create_buffer(transport: str, num_bytes: int, run_id: str, device: torch.device) -> SharedBuffer:
    """``transport`` is ``shm`` or ``cuda_ipc``."""
    if transport == "cuda_ipc":
        return CudaIpcBuffer(num_bytes, device)
    return ShmBuffer(num_bytes, run_id)


def open_buffer(handle: ShmHandle | CudaIpcHandle) -> torch.Tensor:
    """The bytes (N,) behind a handle, read-only by contract. Raises MalformedMessage for a handle that lies."""
    return _open_cuda(handle) if isinstance(handle, CudaIpcHandle) else _open_shm(handle)


def _open_shm(handle: ShmHandle) -> torch.Tensor:
    if not re.fullmatch(rf"{re.escape(SHM_PREFIX)}[A-Za-z0-9-]+-[0-9a-f]{{16}}", handle.segment):
        raise MalformedMessage("not the name of a segment of ours")
    if not handle.segment.startswith(f"{SHM_PREFIX}{handle.run_id}-"):
        raise MalformedMessage("the segment of another run")
    try:
        descriptor = os.open(SHM_FOLDER / handle.segment, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MalformedMessage(f"cannot open segment {handle.segment}: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or status.st_size != handle.num_bytes:
            raise MalformedMessage(f"segment of {status.st_size} bytes where {handle.num_bytes} were announced")
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        mapped = mmap.mmap(descriptor, handle.num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _open_cuda(handle: CudaIpcHandle) -> torch.Tensor:
    try:
        memory, counter, event = (
            bytes.fromhex(digits) for digits in (handle.memory_handle, handle.ref_counter_handle, handle.event_handle)
        )
    except ValueError:
        raise MalformedMessage("a handle of GPU memory that is not hexadecimal") from None
    torch.cuda.init()
    uuids = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if handle.device_uuid not in uuids:
        raise MalformedMessage(f"the weights lie on GPU {handle.device_uuid}, which this process cannot see")
    device = uuids[handle.device_uuid]
    storage = torch.UntypedStorage._new_shared_cuda(
        device,
        memory,
        handle.allocation_bytes,
        handle.allocation_offset,
        counter,
        handle.ref_counter_offset,
        event,
        handle.event_sync_required,
    )
    data = torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)
    if data.numel() < handle.num_bytes:
        raise MalformedMessage(f"GPU buffer of {data.numel()} bytes where {handle.num_bytes} were announced")
    return data[: handle.num_bytes]


class WeightExporter:
    """The learner's end: one persistent buffer, refilled bucket by bucket for each version."""

    def __init__(self, layout: Layout, buffer: SharedBuffer) -> None:
        self.layout = layout
        self._buffer = buffer

    def handle(self, run_id: str) -> ShmHandle | CudaIpcHandle:
        return self._buffer.handle(run_id)

    def fill(self, bucket: int, parameter: Callable[[str], torch.Tensor]) -> str:
        """Copy the tensors of ``bucket`` into its slot, converted to the actor's dtype; returns the checksum."""
        with torch.no_grad():
            for placement in self.layout.bucket(bucket):
                view(self._buffer.data, placement).copy_(parameter(placement.name))
        start, end = self.layout.span(bucket)
        self._buffer.flush()
        return checksum(self._buffer.data[start:end])

    def close(self) -> None:
        self._buffer.close()


class WeightReader:
    """The actor's end: opens the handle once and gives out views of each bucket."""

    def __init__(self, manifest: WeightManifest, handle: ShmHandle | CudaIpcHandle) -> None:
        if manifest.buffer_bytes != handle.num_bytes:
            raise MalformedMessage(f"buffer of {handle.num_bytes} bytes for a layout of {manifest.buffer_bytes}")
        self.layout = Layout.from_manifest(manifest)
        self._data = open_buffer(handle)

    def read(self, bucket: int) -> tuple[list[tuple[str, torch.Tensor]], str]:
        """The named tensors of ``bucket`` (views, valid until it is acknowledged) and the checksum of its bytes."""
        if not 0 <= bucket < self.layout.num_buckets:
            raise MalformedMessage(f"bucket {bucket} of {self.layout.num_buckets}")
        start, end = self.layout.span(bucket)
        tensors = [(p.name, view(self._data, p)) for p in self.layout.bucket(bucket)]
        return tensors, checksum(self._data[start:end])

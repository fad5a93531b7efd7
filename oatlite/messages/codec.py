"""The msgpack form of a message: a small header frame, then raw array frames.

Nothing here can execute: a frame names a struct in :data:`oatlite.messages.MESSAGES`, plain values and arrays of
declared types. Both ends check the declared limits, the sender before it sends and the receiver before it believes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from oatlite.messages import MESSAGES, Message
from oatlite.messages.fields import MAX_ITEMS, Array, MalformedMessage, Spec

MAX_HEADER_BYTES = 256 << 20
MAX_FRAMES = 16
MAX_FIELDS = 64

_SPECS: dict[type[Message], dict[str, Spec]] = {
    cls: {f.name: f.metadata["spec"] for f in dataclasses.fields(cls)} for cls in MESSAGES.values()
}


def encode(message: Message) -> list[bytes | memoryview]:
    """Return the frames of ``message``. Raises MalformedMessage where it breaks its own limits."""
    values: dict[str, Any] = {}
    arrays: list[bytes | memoryview] = []
    for name, spec in _SPECS[type(message)].items():
        value = getattr(message, name)
        try:
            spec.check(value)
        except MalformedMessage as error:
            raise MalformedMessage(f"{type(message).__name__}.{name}: {error}") from None
        if isinstance(spec, Array):
            arrays.append(np.ascontiguousarray(value).data.cast("B"))
        else:
            values[name] = value
    message.validate()
    header = msgpack.packb([type(message).__name__, values], use_bin_type=True)
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"{type(message).__name__}: header of {len(header)} bytes")
    return [header, *arrays]


def decode(frames: Sequence[bytes | memoryview]) -> Message:
    """Rebuild a message; arrays are read-only views of their frames. Raises MalformedMessage, and nothing else."""
    if not 1 <= len(frames) <= MAX_FRAMES or len(frames[0]) > MAX_HEADER_BYTES:
        raise MalformedMessage("wrong number or size of frames")
    try:
        # Refused where they are announced: a list takes eight times its bytes on the wire, and more if they are nested.
        header = msgpack.unpackb(frames[0], raw=False, max_array_len=MAX_ITEMS, max_map_len=MAX_FIELDS, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"header is not msgpack: {type(error).__name__}") from None
    if not (
        isinstance(header, list) and len(header) == 2 and isinstance(header[0], str) and isinstance(header[1], dict)
    ):
        raise MalformedMessage("header is no [name, fields]")
    name, values = header
    cls = MESSAGES.get(name)
    if cls is None:
        raise MalformedMessage("unknown message")
    message = cls(**_read_fields(cls, values, list(frames[1:])))
    message.validate()
    return message


def _read_fields(cls: type[Message], values: dict[str, Any], arrays: list[bytes | memoryview]) -> dict[str, Any]:
    specs = _SPECS[cls]
    array_names = [name for name, spec in specs.items() if isinstance(spec, Array)]
    if set(values) != set(specs) - set(array_names) or len(arrays) != len(array_names):
        raise MalformedMessage(f"{cls.__name__}: wrong set of fields")
    for name, frame in zip(array_names, arrays, strict=True):
        spec = specs[name]
        assert isinstance(spec, Array)
        if len(frame) > spec.max_bytes or len(frame) % np.dtype(spec.dtype).itemsize:
            raise MalformedMessage(f"{cls.__name__}.{name}: {len(frame)} bytes are no array of {spec.dtype}")
        if spec.dtype == "bool" and not bool((np.frombuffer(frame, np.uint8) <= 1).all()):
            raise MalformedMessage(f"{cls.__name__}.{name}: not booleans")
        values[name] = np.frombuffer(frame, dtype=spec.dtype)
    for name, spec in specs.items():
        try:
            spec.check(values[name])
        except MalformedMessage as error:
            raise MalformedMessage(f"{cls.__name__}.{name}: {error}") from None
    return values

"""Real frames of every kind of message, ways to spoil them, and a judge of what the decoder lets through."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from oatlite.messages import MESSAGES, PURPOSES, Message
from oatlite.messages.codec import decode, encode
from oatlite.messages.fields import MalformedMessage

RUN = "0123456789ab"
Frames = list[bytes]

HUGE = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc9")
HUGE += (b"\xdc\xff\xff", b"\xde\xff\xff", b"\xdd\x00\x10\x00\x00", b"\x91" * 2000, b"\x81\xa1a" * 2000)
VALUES = (
    *(None, True, False, 0, 1, -1, 255, 2**31, 2**62, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -1.0, 1e308, math.nan, math.inf, -math.inf, "", "x", "x" * 300, "\0", "../../etc/passwd", b"", b"x" * 40),
    *([], [[]], [None], ["x"], [1] * 50, {}, {"a": {"b": {}}}, msgpack.ExtType(5, b"abc"), msgpack.Timestamp(1)),
)
WORDS = (
    b"\x00",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xc0\x7f",
    b"\x80\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
)


def real_messages(generator: random.Random) -> list[Message]:
    """One of each kind, of the size that a small run sends."""
    numbers = np.random.default_rng(generator.randrange(2**32))
    num_prompts, num_samples = generator.randint(1, 6), generator.randint(1, 3)
    lengths = numbers.integers(1, 12, num_prompts).astype(np.int32)
    responses = numbers.integers(0, 12, num_prompts * num_samples).astype(np.int32)
    words = [f"prompt {i} é" for i in range(num_prompts)]
    answers = [f" answer {i}" * generator.randint(0, 3) for i in range(num_prompts)]
    digest = f"{generator.getrandbits(128):032x}"
    values: dict[str, dict[str, Any]] = {
        "GenerateRequest": {
            "batch_id": str(generator.randrange(100)),
            "policy_version": generator.randrange(100),
            "prompt_tokens": numbers.integers(0, 1000, int(lengths.sum())).astype(np.int32),
            "prompt_lengths": lengths,
            "seeds": numbers.integers(0, 2**63, num_prompts * num_samples).astype(np.uint64),
            "samplers": ["policy"] * (num_prompts * num_samples),
            "is_last_of_version": generator.random() < 0.5,
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 0,
            "max_new_tokens": 64,
        },
        "CandidateBatch": {
            "batch_id": str(generator.randrange(100)),
            "policy_version": generator.randrange(100),
            "samplers": ["policy"] * (num_prompts * num_samples),
            "response_tokens": numbers.integers(0, 1000, int(responses.sum())).astype(np.int32),
            "response_lengths": responses,
            "sampler_logprobs": -numbers.random(int(responses.sum())).astype(np.float32),
            "is_finished": numbers.random(responses.size) < 0.5,
            "texts": [f"text {i}" for i in range(responses.size)],
            "generate_s": 0.5,
            "sleep_s": 0.25,
            "wake_s": 0.125,
        },
        "CompareRequest": {
            "batch_id": "7",
            "purpose": generator.choice(PURPOSES),
            "prompts": words,
            "first": answers,
            "second": answers[::-1],
            "references": generator.choice([[], words]),
        },
        "EncodeRequest": {"batch_id": "8", "prompts": words, "responses": answers},
        "FeatureBatch": {
            "batch_id": "8",
            "features": numbers.random(num_prompts * 4).astype(np.float32),
            "num_features": 4,
            "encode_s": 0.1,
        },
        "PreferenceBatch": {
            "batch_id": "7",
            "first_win": numbers.random(num_prompts).astype(np.float32),
            "is_valid": numbers.random(num_prompts) < 0.8,
            "first_scores": numbers.random(num_prompts).astype(np.float32),
            "second_scores": numbers.random(num_prompts).astype(np.float32),
            "oracle_s": 0.2,
            "num_failures": 1,
        },
        "WeightManifest": {
            "names": [f"layers.{i}.weight" for i in range(num_prompts)],
            "dtypes": ["float32"] * num_prompts,
            "ndims": np.full(num_prompts, 2, np.int64),
            "shapes": np.full(num_prompts * 2, 8, np.int64),
            "buckets": np.arange(num_prompts, dtype=np.int64) // 2,
            "offsets": np.arange(num_prompts, dtype=np.int64) * 256,
            "buffer_bytes": 256 * num_prompts,
        },
        "ShmHandle": {"segment": f"oatlite-{RUN}-{digest[:16]}", "num_bytes": 4096},
        "CudaIpcHandle": {
            "device_uuid": "GPU-1",
            "memory_handle": digest * 4,
            "allocation_bytes": 4096,
            "allocation_offset": 0,
            "ref_counter_handle": digest,
            "ref_counter_offset": 8,
            "event_handle": digest,
            "event_sync_required": True,
            "num_bytes": 4096,
        },
        "BucketReady": {"version": 3, "bucket": 1, "is_last": True, "checksum": digest},
        "BucketLoaded": {"version": 3, "bucket": 1, "checksum": digest, "load_s": 0.01},
        "Hello": {"role": "actor-0", "pid": generator.randint(1, 2**20)},
        "Stage": {"role": "learner-1", "stage": "learn", "detail": "step 3"},
        "Record": {"kind": "step", "body": '{"step": 3, "loss": 0.5}'},
        "Failure": {"role": "actor-0", "exit_code": 3, "message": "gone", "fix": ""},
        "Stop": {},
    }
    assert set(values) == set(MESSAGES)
    return [MESSAGES[name](run_id=RUN, **fields) for name, fields in values.items()]


def frames_of(message: Message) -> Frames:
    return [bytes(frame) for frame in encode(message)]


# --------------------------------------------------------------------------- spoiling

Spoil = Callable[[random.Random, Frames, list[Frames]], Frames]


def _place(generator: random.Random, frames: Frames) -> tuple[int, int]:
    """A frame, most often the header, and a place in it."""
    index = 0 if generator.random() < 0.6 else generator.randrange(len(frames))
    return index, generator.randrange(len(frames[index]) + 1)


def _with(frames: Frames, index: int, frame: bytes) -> Frames:
    return [*frames[:index], frame, *frames[index + 1 :]]


def flip_bits(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    index, _ = _place(generator, frames)
    data = bytearray(frames[index])
    for _ in range(min(len(data), generator.choice((1, 1, 2, 8)))):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return _with(frames, index, bytes(data))


def truncate(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    index, place = _place(generator, frames)
    end = generator.choice((len(frames[index]), place + generator.randint(1, 8)))
    return _with(frames, index, frames[index][:place] + frames[index][end:])


def extend(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    index, place = _place(generator, frames)
    more = generator.choice((generator.randbytes(generator.randint(1, 64)), generator.choice(WORDS) * 4, frames[0]))
    return _with(frames, index, frames[index][:place] + more + frames[index][place:])


def swap(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """Frames in another order, left out, doubled, or of another message."""
    frames, other = list(frames), generator.choice(others)
    match generator.randrange(5):
        case 0:
            generator.shuffle(frames)
        case 1 if len(frames) > 1:
            del frames[generator.randrange(len(frames))]
        case 2:
            frames.insert(generator.randint(0, len(frames)), generator.choice(frames))
        case 3:
            frames[generator.randrange(len(frames))] = generator.choice(other)
        case _:
            frames = [frames[0], *other[1:]] if generator.random() < 0.9 else frames * 20
    return frames


def announce_much(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """Lengths of far more than there is, and deep nesting."""
    index, place = _place(generator, frames)
    skipped = generator.choice((0, 1, 5))
    return _with(frames, index, frames[index][:place] + generator.choice(HUGE) + frames[index][place + skipped :])


def other_values(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """The header packed again with a value of another type or size, or with other names."""
    name, values = msgpack.unpackb(frames[0])
    key = generator.choice(list(values))
    match generator.randrange(6):
        case 0:
            values[key + generator.choice("_s")] = values.pop(key)
        case 1:
            values[generator.choice(("run_id", "__class__", "more"))] = generator.choice(VALUES)
        case 2:
            name = generator.choice((*MESSAGES, "Message", "", "os.system", None, 7))
        case 3 if isinstance(values[key], list) and values[key]:
            values[key][generator.randrange(len(values[key]))] = generator.choice(VALUES)
        case _:
            values[key] = generator.choice(VALUES)
    header = [name, values] if generator.random() < 0.95 else generator.choice(([values, name], values, [name], name))
    return _with(frames, 0, msgpack.packb(header))


def other_numbers(generator: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """Words of an array overwritten by extreme ones: NaN, infinity, the least and the greatest integer."""
    index = generator.randrange(len(frames))
    data, word = bytearray(frames[index]), generator.choice(WORDS) * generator.choice((1, 2, 4, 8))
    place = generator.randrange(len(data) + 1) // 4 * 4
    data[place : place + len(word)] = word[: len(data) - place]
    return _with(frames, index, bytes(data))


SPOIL: tuple[Spoil, ...] = (flip_bits, truncate, extend, swap, announce_much, other_values, other_numbers)


def spoiled(generator: random.Random, originals: list[Frames]) -> tuple[str, Frames]:
    """The name of the way, and the frames of one of ``originals`` after it, or after it and others."""
    way, frames = generator.choice(SPOIL), generator.choice(originals)
    frames = way(generator, frames, originals)
    while generator.random() < 0.2:
        blindly = generator.choice(SPOIL[:5])  # the others read the frames first
        frames = blindly(generator, frames, originals) if frames else frames
    return way.__name__, frames or [b""]


# --------------------------------------------------------------------------- judging


def fault_of(message: Message) -> str | None:
    """Why a message that was let through should not have been; written apart from what the decoder checks by."""
    if type(message) not in MESSAGES.values():
        return f"a {type(message)}"
    for field in dataclasses.fields(message):
        value, spec = getattr(message, field.name), field.metadata["spec"]
        match str(field.type):
            case "str":
                fine = type(value) is str and len(value.encode()) <= spec.max_bytes
            case "int":
                fine = type(value) is int and spec.low <= value <= spec.high
            case "float":
                fine = type(value) is float and math.isfinite(value) and spec.low <= value <= spec.high
            case "bool":
                fine = type(value) is bool
            case "list[str]":
                fine = type(value) is list and all(type(v) is str and len(v) <= spec.each.max_bytes for v in value)
            case array:
                dtype = {"Bool": "bool"}.get(array, array.lower())
                fine = type(value) is np.ndarray and value.ndim == 1 and value.dtype == dtype
                fine = fine and not value.flags.writeable
        if not fine:
            return f"{type(message).__name__}.{field.name} = {value!r:.80}"
    try:
        frames = frames_of(message)
        again = frames_of(decode(frames))
    except MalformedMessage as error:
        return f"cannot be sent: {error}"
    return None if frames == again else "comes out differently when it is sent again"

"""Every struct that crosses a process. :mod:`oatlite.messages.codec` has their form on the wire."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oatlite.messages.fields import MalformedMessage, array, flag, integer, real, text, texts
from oatlite.sampling import SamplingOptions

MAX_DIMS = 16
PURPOSES = ("train", "eval")

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all messages. ``run_id`` keeps the messages of another run out."""

    run_id: str = text()

    def validate(self) -> None:
        """Check what no single field can show, such as lengths that must agree. Raises MalformedMessage."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise MalformedMessage(what)


# --------------------------------------------------------------------------- actor and learner: rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest(Message):
    """Sample ``num_candidates`` responses for each prompt with the weights of ``policy_version``.

    ``prompt_tokens`` holds all prompts end to end, ``prompt_lengths`` (M,) cuts them; ``seeds`` and ``samplers``
    (M * N,) have one of each per sample, a prompt's N samples side by side. ``samplers`` are of
    ``oatlite.samplers.SAMPLERS``, of which the reference is the same in all versions. ``is_last_of_version`` says that
    the next weights come before the next request of this kind. The last four fields are those of ``sampling``.
    """

    batch_id: str = text()
    policy_version: int = integer()
    prompt_tokens: Int32 = array("int32")
    prompt_lengths: Int32 = array("int32")
    seeds: UInt64 = array("uint64")
    samplers: list[str] = texts(max_bytes=32)
    is_last_of_version: bool = flag()
    temperature: float = real(0.0, 100.0)
    top_p: float = real(0.0, 1.0)
    top_k: int = integer(0, 1 << 24)
    max_new_tokens: int = integer(1, 1 << 20)

    @property
    def num_candidates(self) -> int:
        return self.seeds.size // max(1, self.prompt_lengths.size)

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
        )

    def validate(self) -> None:
        _require(int(self.prompt_lengths.sum()) == self.prompt_tokens.size, "prompt lengths do not add up")
        _require(bool((self.prompt_lengths > 0).all()), "an empty prompt")
        _require(self.seeds.size == self.prompt_lengths.size * self.num_candidates, "prompts without equal shares")
        _require(self.seeds.size == len(self.samplers), "not one sampler per sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateBatch(Message):
    """The answer to a GenerateRequest; the samples stand in the order of its seeds (M * N,).

    ``samplers`` are those of the request. ``sampler_logprobs`` belong to ``response_tokens`` one to one: the
    log-probability of each sampled token under the distribution of its own sampler, in ``policy_version``, at
    temperature 1. ``is_finished`` says that the response ended with EOS (a sampled token, present in
    ``response_tokens``) and not at the length limit. ``wake_s`` was spent in waking the engine since the last answer,
    ``sleep_s`` in putting it to sleep after this one.
    """

    batch_id: str = text()
    policy_version: int = integer()
    samplers: list[str] = texts(max_bytes=32)
    response_tokens: Int32 = array("int32")
    response_lengths: Int32 = array("int32")
    sampler_logprobs: Float32 = array("float32")
    is_finished: Bool = array("bool")
    texts: list[str] = texts()
    generate_s: float = real(0.0)
    sleep_s: float = real(0.0)
    wake_s: float = real(0.0)

    def validate(self) -> None:
        _require(int(self.response_lengths.sum()) == self.response_tokens.size, "response lengths do not add up")
        _require(bool((self.response_lengths >= 0).all()), "a negative response length")
        _require(self.sampler_logprobs.size == self.response_tokens.size, "not one log-probability per token")
        _require(bool(np.isfinite(self.sampler_logprobs).all()), "a log-probability that is not finite")
        _require(self.is_finished.size == self.response_lengths.size == len(self.texts), "samples do not agree")
        _require(self.response_lengths.size == len(self.samplers), "not one sampler per sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest(Message):
    """Ask an oracle at the actor which of two responses to each prompt is better (B pairs).

    ``purpose`` says which: ``train`` or ``eval``. ``references`` is empty or holds one answer of the dataset per pair,
    for oracles that verify.
    """

    batch_id: str = text()
    purpose: str = text(16)
    prompts: list[str] = texts()
    first: list[str] = texts()
    second: list[str] = texts()
    references: list[str] = texts()

    def validate(self) -> None:
        _require(self.purpose in PURPOSES, "an oracle that there is none of")
        _require(len(self.prompts) == len(self.first) == len(self.second), "pairs do not agree")
        _require(len(self.references) in (0, len(self.prompts)), "not one reference per pair")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest(Message):
    """Ask the encoder at the actor for the features of each prompt with its response (B pairs)."""

    batch_id: str = text()
    prompts: list[str] = texts()
    responses: list[str] = texts()

    def validate(self) -> None:
        _require(len(self.prompts) == len(self.responses), "prompts and responses do not agree")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBatch(Message):
    """The answer to an EncodeRequest: features (B * D,), row by row; NaN for a response that is too long."""

    batch_id: str = text()
    features: Float32 = array("float32")
    num_features: int = integer(1, 1 << 24)
    encode_s: float = real(0.0)

    def validate(self) -> None:
        _require(self.features.size % self.num_features == 0, "features are no whole rows")
        _require(not bool(np.isinf(self.features).any()), "a feature that is infinite")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch(Message):
    """The answer to a CompareRequest: P(first wins) (B,) and, from a reward oracle, both rewards (else empty).

    Where ``is_valid`` is False the oracle gave no usable verdict: the pair carries no weight in training.
    ``num_failures`` requests failed on the way and were made again.
    """

    batch_id: str = text()
    first_win: Float32 = array("float32")
    is_valid: Bool = array("bool")
    first_scores: Float32 = array("float32")
    second_scores: Float32 = array("float32")
    oracle_s: float = real(0.0)
    num_failures: int = integer()

    def validate(self) -> None:
        _require(self.is_valid.size == self.first_win.size, "verdicts do not agree")
        usable = self.first_win[self.is_valid]
        _require(bool(((usable >= 0) & (usable <= 1)).all()), "a win probability outside [0, 1]")
        for scores in (self.first_scores, self.second_scores):
            _require(scores.size in (0, self.first_win.size), "not one score per pair")
            _require(scores.size == 0 or bool(np.isfinite(scores[self.is_valid]).all()), "a score that is not finite")


# --------------------------------------------------------------------------- actor and learner: weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest(Message):
    """What the weight buffer holds, sent once per actor start: tensor i lies in ``buckets[i]`` at ``offsets[i]``.

    ``shapes`` holds all shapes end to end, ``ndims`` cuts them. A bucket ends where a module ends.
    """

    names: list[str] = texts(max_bytes=512)
    dtypes: list[str] = texts(max_bytes=16)
    ndims: Int64 = array("int64")
    shapes: Int64 = array("int64")
    buckets: Int64 = array("int64")
    offsets: Int64 = array("int64")
    buffer_bytes: int = integer(1, 1 << 46)

    def validate(self) -> None:
        n = len(self.names)
        _require(n > 0 and len(set(self.names)) == n, "tensor names are missing or repeated")
        sizes = {len(self.dtypes), self.ndims.size, self.buckets.size, self.offsets.size}
        _require(sizes == {n}, "tensors do not agree")
        _require(bool(((self.ndims >= 0) & (self.ndims <= MAX_DIMS)).all()), "a tensor of too many dimensions")
        _require(int(self.ndims.sum()) == self.shapes.size, "shapes do not add up")
        _require(bool((self.shapes >= 0).all()) and bool((self.offsets >= 0).all()), "a negative shape or offset")
        steps = np.diff(self.buckets)
        _require(int(self.buckets[0]) == 0 and bool(((steps == 0) | (steps == 1)).all()), "buckets are out of order")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShmHandle(Message):
    """The weight buffer as a file under /dev/shm."""

    segment: str = text(64)
    num_bytes: int = integer(1, 1 << 46)


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcHandle(Message):
    """The weight buffer as a CUDA IPC handle; byte fields are hexadecimal, sizes are in bytes."""

    device_uuid: str = text(64)
    memory_handle: str = text(256)
    allocation_bytes: int = integer(1, 1 << 46)
    allocation_offset: int = integer(0, 1 << 46)
    ref_counter_handle: str = text(256)
    ref_counter_offset: int = integer(0, 1 << 46)
    event_handle: str = text(256)
    event_sync_required: bool = flag()
    num_bytes: int = integer(1, 1 << 46)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketReady(Message):
    """Bucket ``bucket`` of ``version`` lies in the buffer; the last one completes the update."""

    version: int = integer()
    bucket: int = integer(0, 1 << 24)
    is_last: bool = flag()
    checksum: str = text(64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketLoaded(Message):
    """The actor holds no reference into the bucket any more; ``checksum`` is of the bytes that it read."""

    version: int = integer()
    bucket: int = integer(0, 1 << 24)
    checksum: str = text(64)
    load_s: float = real(0.0)


# --------------------------------------------------------------------------- all roles: life and death


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """A worker is ready. An actor holds the weights that it loaded at start, ``policy_version`` 0 of its run."""

    role: str = text(32)
    pid: int = integer(1, 1 << 31)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Message):
    """What a worker does now; repeated as its heartbeat."""

    role: str = text(32)
    stage: str = text(32)
    detail: str = text(512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Message):
    """A line for people: ``kind`` step, eval, summary, pair or note; ``body`` is JSON."""

    kind: str = text(16)
    body: str = text(1 << 20)

    def content(self) -> dict[str, Any]:
        """What ``body`` says: a note's ``text``, a pair, or a record with its step. Raises MalformedMessage."""
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise MalformedMessage(f"Record.body is not JSON: {type(error).__name__}") from None
        _require(isinstance(content, dict), "Record.body is no object")
        if self.kind == "note":
            _require(isinstance(content.get("text"), str), "Record.body: a note without text")
        elif self.kind != "pair":
            _require(content.get("kind") == self.kind, "Record.body is of another kind")
            _require(self.kind == "summary" or type(content.get("step")) is int, "Record.body has no step")
            _require(isinstance(content.get("perf", {}), dict), "Record.body: perf is no object")
        return dict(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Message):
    """A worker ends, with the exit code and the words of an OatliteError."""

    role: str = text(32)
    exit_code: int = integer(1, 255)
    message: str = text(8192)
    fix: str = text(8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Message):
    """Finish and exit with 0."""


MESSAGES: dict[str, type[Message]] = {
    cls.__name__: cls
    for cls in (
        GenerateRequest,
        CandidateBatch,
        CompareRequest,
        EncodeRequest,
        FeatureBatch,
        PreferenceBatch,
        WeightManifest,
        ShmHandle,
        CudaIpcHandle,
        BucketReady,
        BucketLoaded,
        Hello,
        Stage,
        Record,
        Failure,
        Stop,
    )
}


def join(parts: Sequence[npt.NDArray[Any]], dtype: str) -> tuple[npt.NDArray[Any], Int32]:
    """Lay one-dimensional arrays end to end; returns the array and the length of each part (int32)."""
    lengths = np.array([len(part) for part in parts], dtype=np.int32)
    flat = np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype)
    return flat.astype(dtype, copy=False), lengths


def cut(flat: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Undo :func:`join`."""
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []

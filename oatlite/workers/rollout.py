"""The learner's end of its actors: requests, weights, and what happens when an actor comes back from the dead.

At-least-once delivery, exactly-once training: every request is kept until its answer is in, a restarted actor gets
the current weights and the whole request again, and an answer to anything else is dropped and counted.

Order of a weight update, bucket b of n: fill b, offer b, fill b + 1 into the other slot, wait until every actor has
acknowledged b, and so on. A slot is refilled only after all acknowledgements of the bucket that lay in it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from oatlite.algorithms.base import Candidate
from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import (
    BucketLoaded,
    BucketReady,
    CandidateBatch,
    CompareRequest,
    EncodeRequest,
    FeatureBatch,
    Float32,
    GenerateRequest,
    Hello,
    Int32,
    Message,
    PreferenceBatch,
    Stop,
    UInt64,
    cut,
    join,
)
from oatlite.oracles.base import Verdicts
from oatlite.sampling import SamplingOptions
from oatlite.transport import Hub
from oatlite.weights import WeightExporter

Request = TypeVar("Request", GenerateRequest, CompareRequest, EncodeRequest)
Answer = TypeVar("Answer", CandidateBatch, PreferenceBatch, FeatureBatch)

Purpose = Literal["train", "eval"]

# Opens the parameters with these names for reading, and closes them again.
ParameterSource = Callable[[Sequence[str]], AbstractContextManager[Callable[[str], torch.Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds that an actor may take, per kind of request."""

    start_s: float
    generate_s: float
    oracle_s: float
    sync_s: float


class ActorPool:
    """The actors of one learner rank. All methods block, each with its deadline, and are called by one thread at a
    time."""

    def __init__(
        self,
        hub: Hub,
        actors: Sequence[str],
        run_id: str,
        deadlines: Deadlines,
        exporter: WeightExporter,
        vocab_size: int,
    ) -> None:
        self._hub = hub
        self._actors = list(actors)
        self._run_id = run_id
        self._deadlines = deadlines
        self._exporter = exporter
        self._vocab_size = vocab_size
        self._source: ParameterSource | None = None
        self._num_batches = 0
        self._set_aside: deque[tuple[str, Message]] = deque()
        self.policy_version = 0
        self.reload_s = self.sleep_s = self.wake_s = 0.0

    def wait_until_ready(self) -> None:
        """Raises DeadlineExceeded naming the actors that did not start."""
        waiting = set(self._actors)
        deadline = time.monotonic() + self._deadlines.start_s
        while waiting:
            peer, message = self._receive(deadline, waiting, "has not started")
            if isinstance(message, Hello) and peer in self._actors:
                self._welcome(peer)
                waiting.discard(peer)
            else:
                self._drop(peer, message)

    def generate(
        self,
        prompts: Sequence[Int32],
        seeds: UInt64,
        samplers: Sequence[Sequence[str]],
        sampling: SamplingOptions,
        *,
        is_last_of_version: bool = False,
    ) -> tuple[list[list[Candidate]], float]:
        """Sample N candidates for each of M prompts; ``seeds`` and ``samplers`` are (M, N).

        ``is_last_of_version`` promises that a sync comes before the next call. Returns the candidates and the longest
        time that an actor spent generating, in seconds.
        """
        parts = self._split(len(prompts))
        requests = {}
        for peer, part in parts.items():
            tokens, lengths = join(prompts[part], "int32")
            requests[peer] = GenerateRequest(
                run_id=self._run_id,
                batch_id=self._next_batch_id(),
                policy_version=self.policy_version,
                prompt_tokens=tokens,
                prompt_lengths=lengths,
                seeds=seeds[part].reshape(-1),
                samplers=[sampler for several in samplers[part] for sampler in several],
                is_last_of_version=is_last_of_version,
                **asdict(sampling),
            )
        answers = self._exchange(requests, CandidateBatch, self._deadlines.generate_s, self._answers_generate)
        num_candidates = seeds.shape[1]
        candidates = [several for peer in parts for several in _candidates(answers[peer], num_candidates)]
        self.sleep_s += max((answer.sleep_s for answer in answers.values()), default=0.0)
        self.wake_s += max((answer.wake_s for answer in answers.values()), default=0.0)
        return candidates, max((answer.generate_s for answer in answers.values()), default=0.0)

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
        *,
        purpose: Purpose = "train",
    ) -> tuple[Verdicts, float]:
        """Ask an oracle on B pairs: the one of training, or that of evaluation, which may be the same.

        Returns verdicts and the longest time that an actor's oracle took, in seconds.
        """
        parts = self._split(len(prompts))
        requests = {
            peer: CompareRequest(
                run_id=self._run_id,
                batch_id=self._next_batch_id(),
                purpose=purpose,
                prompts=list(prompts[part]),
                first=list(first[part]),
                second=list(second[part]),
                references=list(references[part]) if references is not None else [],
            )
            for peer, part in parts.items()
        }
        answers = self._exchange(requests, PreferenceBatch, self._deadlines.oracle_s, _answers_compare)
        batches = [answers[peer] for peer in parts]
        verdicts = Verdicts.joined([_verdicts(batch) for batch in batches])
        return verdicts, max((batch.oracle_s for batch in batches), default=0.0)

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Float32, float]:
        """The features (B, D) of B prompts with a response each, and the longest time that an actor took, in seconds.

        What an encoder cannot take is NaN.
        """
        parts = self._split(len(prompts))
        requests = {
            peer: EncodeRequest(
                run_id=self._run_id,
                batch_id=self._next_batch_id(),
                prompts=list(prompts[part]),
                responses=list(responses[part]),
            )
            for peer, part in parts.items()
        }
        answers = self._exchange(requests, FeatureBatch, self._deadlines.oracle_s, _answers_encode)
        rows = [answers[peer].features.reshape(-1, answers[peer].num_features) for peer in parts]
        features = np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)
        return features, max((answer.encode_s for answer in answers.values()), default=0.0)

    def sync(self, version: int, source: ParameterSource) -> list[str]:
        """Push the parameters of ``source`` into all actors as ``version``; returns the checksum of each bucket.

        ``source`` is used again for an actor that restarts, until the next sync.
        """
        self._source = source
        self.policy_version = version
        checksums, returned = self._push(self._actors, version, source)
        for peer in sorted(returned):
            self._welcome(peer)
        return checksums

    def stop(self) -> None:
        for peer in self._actors:
            self._send(peer, Stop(run_id=self._run_id))

    def close(self) -> None:
        self._hub.close(flush_s=5.0)
        self._exporter.close()

    def _push(self, peers: Sequence[str], version: int, source: ParameterSource) -> tuple[list[str], set[str]]:
        """Returns the checksums, and the actors that restarted meanwhile and hold nothing of this version."""
        layout = self._exporter.layout
        targets = list(peers)
        returned: set[str] = set()
        checksums: list[str] = []
        self.reload_s = 0.0
        for bucket in range(layout.num_buckets):
            with source([placement.name for placement in layout.bucket(bucket)]) as parameter:
                checksums.append(self._exporter.fill(bucket, parameter))
            if bucket:
                returned |= self._acknowledged(targets, version, bucket - 1, checksums[bucket - 1])
                targets = [peer for peer in targets if peer not in returned]
            is_last = bucket == layout.num_buckets - 1
            ready = BucketReady(
                run_id=self._run_id, version=version, bucket=bucket, is_last=is_last, checksum=checksums[bucket]
            )
            for peer in targets:
                self._send(peer, ready)
        returned |= self._acknowledged(targets, version, layout.num_buckets - 1, checksums[-1])
        return checksums, returned

    def _acknowledged(self, peers: Sequence[str], version: int, bucket: int, checksum: str) -> set[str]:
        """Wait until every one of ``peers`` has let go of ``bucket``; returns the actors that restarted meanwhile.

        An answer that arrives here belongs to a request that another actor's restart has interrupted.
        """
        waiting = set(peers)
        returned: set[str] = set()
        deadline = time.monotonic() + self._deadlines.sync_s
        reload_s = 0.0
        while waiting:
            peer, message = self._receive(deadline, waiting, f"has not loaded weights {version}")
            if isinstance(message, Hello) and peer in self._actors:
                returned.add(peer)
                waiting.discard(peer)
            elif (
                isinstance(message, BucketLoaded)
                and peer in waiting
                and (message.version, message.bucket) == (version, bucket)
            ):
                if message.checksum != checksum:
                    raise WorkerDied(f"{peer} read other bytes of weights {version} than were written")
                reload_s = max(reload_s, message.load_s)
                waiting.discard(peer)
            elif isinstance(message, CandidateBatch | PreferenceBatch | FeatureBatch):
                self._set_aside.append((peer, message))
            else:
                self._drop(peer, message)
        self.reload_s += reload_s
        return returned

    def _welcome(self, peer: str) -> set[str]:
        """Show a fresh actor where weights lie, and bring it to the version that the others hold.

        Returns all actors that were made ready: others may have restarted meanwhile.
        """
        ready = {peer}
        self._send(peer, self._exporter.layout.manifest(self._run_id))
        self._send(peer, self._exporter.handle(self._run_id))
        if self._source is not None:
            _, returned = self._push([peer], self.policy_version, self._source)
            for again in sorted(returned):
                ready |= self._welcome(again)
        return ready

    def _exchange(
        self,
        requests: dict[str, Request],
        kind: type[Answer],
        timeout_s: float,
        fits: Callable[[Request, Answer], bool],
    ) -> dict[str, Answer]:
        """Send each actor its request and collect the answers; what does not fit its request is dropped."""
        answers: dict[str, Answer] = {}
        for peer, request in requests.items():
            self._send(peer, request)
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(requests):
            waiting = set(requests) - set(answers)
            if self._set_aside:
                peer, message = self._set_aside.popleft()
            else:
                peer, message = self._receive(deadline, waiting, f"has not answered a {_kind(requests)}")
            if isinstance(message, Hello) and peer in self._actors:
                for fresh in sorted(self._welcome(peer) & waiting):
                    self._send(fresh, requests[fresh])
                deadline = time.monotonic() + timeout_s
            elif isinstance(message, kind) and peer in waiting and fits(requests[peer], message):
                answers[peer] = message
            else:
                self._drop(peer, message)
        return answers

    def _answers_generate(self, request: GenerateRequest, answer: CandidateBatch) -> bool:
        tokens = answer.response_tokens
        return (
            answer.batch_id == request.batch_id
            and answer.policy_version == request.policy_version
            and answer.samplers == request.samplers
            and int(answer.response_lengths.max(initial=0)) <= request.max_new_tokens
            and (tokens.size == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < self._vocab_size))
        )

    def _split(self, count: int) -> dict[str, slice]:
        """Cut ``count`` items into one contiguous part per actor, as even as can be; empty parts are left out."""
        ends = [count * (i + 1) // len(self._actors) for i in range(len(self._actors))]
        parts = {peer: slice(start, end) for peer, start, end in zip(self._actors, [0, *ends], ends, strict=False)}
        return {peer: part for peer, part in parts.items() if part.stop > part.start}

    def _next_batch_id(self) -> str:
        self._num_batches += 1
        return str(self._num_batches)

    def _send(self, peer: str, message: Message) -> None:
        try:
            self._hub.send(peer, message)
        except WorkerDied:
            # Its successor will say Hello and be sent this again, or the supervisor ends the run.
            self._drop(peer, message, why="undelivered")

    def _receive(self, deadline: float, waiting: set[str], what: str) -> tuple[str, Message]:
        left_s = deadline - time.monotonic()
        received = self._hub.receive(left_s) if left_s > 0 else None
        if received is None:
            raise DeadlineExceeded(f"{', '.join(sorted(waiting))} {what} in time", "raise timeouts.* with --set")
        return received

    def _drop(self, peer: str, message: Message, why: str = "unexpected") -> None:
        self._hub.drop(why, peer, type(message).__name__)


def _kind(requests: dict[str, Any]) -> str:
    words = {GenerateRequest: "request to generate", CompareRequest: "comparison", EncodeRequest: "request to encode"}
    return words[type(next(iter(requests.values())))]


def _answers_compare(request: CompareRequest, answer: PreferenceBatch) -> bool:
    return answer.batch_id == request.batch_id and answer.first_win.size == len(request.prompts)


def _answers_encode(request: EncodeRequest, answer: FeatureBatch) -> bool:
    return answer.batch_id == request.batch_id and answer.features.size == answer.num_features * len(request.prompts)


def _verdicts(batch: PreferenceBatch) -> Verdicts:
    has_scores = bool(batch.first_scores.size)
    return Verdicts(
        first_win=batch.first_win,
        is_valid=batch.is_valid,
        first_scores=batch.first_scores if has_scores else None,
        second_scores=batch.second_scores if has_scores else None,
        num_failures=batch.num_failures,
    )


def _candidates(answer: CandidateBatch, num_candidates: int) -> list[list[Candidate]]:
    tokens = cut(answer.response_tokens, answer.response_lengths)
    logprobs = cut(answer.sampler_logprobs, answer.response_lengths)
    flat = [
        Candidate(
            tokens=tokens[i],
            logprobs=logprobs[i],
            text=answer.texts[i],
            is_finished=bool(answer.is_finished[i]),
            sampler=answer.samplers[i],
        )
        for i in range(len(tokens))
    ]
    return [flat[i : i + num_candidates] for i in range(0, len(flat), num_candidates)]

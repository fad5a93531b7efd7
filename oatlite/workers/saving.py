"""What a learner rank puts into a checkpoint, and how it takes it up again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from oatlite.checkpoint import Checkpoint, CheckpointWriter, FileRecord, prune
from oatlite.layouts import TokenPair
from oatlite.messages import cut, join
from oatlite.samplers import SAMPLERS
from oatlite.trainer import Trainer
from oatlite.workers.buffer import Entry, PairBuffer, TrainingPair
from oatlite.workers.explorer import Explorer
from oatlite.workers.policies import PolicyWeights

BEHAVIOUR, HEAD = "behaviour.safetensors", "head.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands: finished steps, oracle queries so far, and the version of the policy that samples."""

    step: int = 0
    num_queries: int = 0
    policy_version: int = 0


class Saves(Protocol):
    """What the loop needs of checkpoints; :class:`Keeper` is the real one."""

    def save(self, progress: Progress, newest_version: int) -> None: ...


class Keeper:
    """Saves and restores one rank's part: optimizer and weights, the behaviour policy where it lags, the buffer, and
    the epistemic head with its comparisons, if there is one.

    Nothing else is needed: prompts, seeds and draws are functions of the run's seed and the step.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int,
        trainer: Trainer,
        policies: PolicyWeights,
        buffer: PairBuffer,
        rank: int,
        about: Mapping[str, Any],
        explorer: Explorer | None = None,
    ) -> None:
        self._root = root
        self._keep_last = keep_last
        self._trainer = trainer
        self._policies = policies
        self._buffer = buffer
        self._rank = rank
        self._about = dict(about)
        self._explorer = explorer

    def save(self, progress: Progress, newest_version: int) -> None:
        """Write a checkpoint; all ranks together. Raises StorageError; the checkpoints before it stay whole.

        ``newest_version`` is that of the weights which the trainer holds.
        """
        writer = CheckpointWriter(self._root, progress.step)
        if self._rank == 0:
            writer.begin()
        self._wait_for_all()
        self._trainer.save(writer.folder, writer.open)
        with writer.open(_buffer_name(self._rank)) as file:
            file.write(pack(self._buffer))
        lagging = self._policies.lagging_behaviour if progress.policy_version != newest_version else None
        if lagging is not None and self._rank == 0:
            with writer.open(BEHAVIOUR) as file:
                file.write(save(lagging))
        head = self._explorer.state() if self._explorer is not None else {}
        if head and self._rank == 0:  # which is the same on every rank
            with writer.open(HEAD) as file:
                file.write(save(head))
        records = json.dumps([dataclasses.astuple(record) for record in writer.records]).encode()
        parts = self._trainer.gather_bytes(records)
        if self._rank == 0:
            everything = [FileRecord(*record) for part in parts for record in json.loads(part)]
            writer.complete(progress.step, everything, self._about | {"progress": dataclasses.asdict(progress)})
            prune(self._root, self._keep_last)
        self._wait_for_all()

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Take up what was saved; all ranks together."""
        self._trainer.load(checkpoint.folder)
        progress = Progress(**checkpoint.about["progress"])
        self._buffer.restore(*unpack(checkpoint.folder / _buffer_name(self._rank)))
        self._policies.adopt()
        written = {record.name for record in checkpoint.files}
        behaviour = checkpoint.folder / BEHAVIOUR
        if BEHAVIOUR in written:
            with safe_open(behaviour, "pt") as file:
                self._policies.adopt_copy({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        head = checkpoint.folder / HEAD
        if self._explorer is not None and HEAD in written:
            with safe_open(head, "pt") as file:
                self._explorer.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if self._rank == 0:
            prune(self._root, self._keep_last, newer_than=progress.step)
        self._wait_for_all()
        return progress

    def _wait_for_all(self) -> None:
        self._trainer.add_up([0.0])


def _buffer_name(rank: int) -> str:
    return f"pairs-{rank}.safetensors"


_TOKENS = ("prompt", "chosen", "rejected")


def pack(buffer: PairBuffer) -> bytes:
    """A buffer as safetensors: each field of all pairs end to end, with the lengths of the parts."""
    entries = list(buffer)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "held": np.array(buffer.steps, np.int64),
        "step": np.array([entry.step for entry in entries], np.int64),
        "is_trainable": np.array([entry.pair.is_trainable for entry in entries], np.bool_),
        "margin": np.array([entry.pair.margin for entry in entries], np.float64),
        "policy_version": np.array([entry.pair.policy_version for entry in entries], np.int64),
        "samplers": np.array([SAMPLERS.index(name) for e in entries for name in e.pair.samplers], np.int64),
        "has_reference": np.array([entry.reference_logprobs is not None for entry in entries], np.bool_),
        "has_sampler": np.array([entry.pair.sampler_logprobs is not None for entry in entries], np.bool_),
    }
    for name in _TOKENS:
        arrays[name], arrays[f"{name}_lengths"] = join([getattr(e.pair.tokens, name) for e in entries], "int32")
    sampled = [entry.pair.sampler_logprobs for entry in entries if entry.pair.sampler_logprobs is not None]
    arrays["sampler"], _ = join(sampled, "float32")
    scored = [entry.reference_logprobs for entry in entries if entry.reference_logprobs is not None]
    arrays["reference"], _ = join(scored, "float32")
    return save({name: torch.from_numpy(array) for name, array in arrays.items()})


def unpack(path: Path) -> tuple[list[int], list[Entry]]:
    """The steps that a packed buffer held, and its entries."""
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tokens = [cut(arrays[name], arrays[f"{name}_lengths"]) for name in _TOKENS]
    lengths = arrays["chosen_lengths"] + arrays["rejected_lengths"]
    sampler = iter(cut(arrays["sampler"], lengths[arrays["has_sampler"]]))
    reference = iter(cut(arrays["reference"], lengths[arrays["has_reference"]]))
    samplers = [SAMPLERS[index] for index in arrays["samplers"]]
    entries = [
        Entry(
            pair=TrainingPair(
                tokens=TokenPair(prompt=prompt, chosen=chosen, rejected=rejected),
                sampler_logprobs=next(sampler) if arrays["has_sampler"][i] else None,
                is_trainable=bool(arrays["is_trainable"][i]),
                margin=float(arrays["margin"][i]),
                samplers=(samplers[2 * i], samplers[2 * i + 1]),
                policy_version=int(arrays["policy_version"][i]),
            ),
            step=int(arrays["step"][i]),
            reference_logprobs=next(reference) if arrays["has_reference"][i] else None,
        )
        for i, (prompt, chosen, rejected) in enumerate(zip(*tokens, strict=True))
    ]
    return arrays["held"].tolist(), entries

"""The only module that knows DeepSpeed: one rank of the learner's optimizer, and what its ranks agree on."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torch.distributed as dist
from torch import nn

from oatlite.errors import CheckpointError

SCHEDULE_FLOOR = 0.1
STATE_FOLDER = "optimizer"
ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the learner ranks. ``rendezvous`` is a file in a private folder that does not exist yet."""

    rank: int
    count: int
    rendezvous: Path
    device: torch.device
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """``num_steps`` gradient steps of ``micro_steps`` micro-batches each; ``num_steps`` sets the schedule's length.

    ``offloads_optimizer`` (ZeRO 1 to 3) keeps its state in host memory and steps there, ``offloads_parameters``
    (ZeRO 3) the weights.
    """

    lr: float
    schedule: ScheduleName
    warmup_ratio: float
    num_steps: int
    micro_steps: int
    micro_batch_size: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    zero_stage: int
    dtype: str
    offloads_optimizer: bool = False
    offloads_parameters: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """``lr`` of the step just taken and the gradient's norm before clipping."""

    lr: float
    grad_norm: float


def schedule_factor(step: int, *, schedule: ScheduleName, num_steps: int, warmup_ratio: float) -> float:
    """The learning rate of gradient step ``step`` (from 0) as a share of its peak.

    Linear warm-up, then a cosine that ends at 0.1, a line that ends at 0, or a constant. What comes after the last
    step that was planned for has the rate of that one.
    """
    step = min(step, num_steps - 1)
    num_warmup = math.ceil(warmup_ratio * num_steps) if schedule != "constant" else 0
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    if schedule == "linear":
        return 1.0 - progress
    return SCHEDULE_FLOOR + (1 - SCHEDULE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def join_ranks(ranks: Ranks) -> None:
    """Meet the other ranks through a file, on loopback alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ.update(
        RANK=str(ranks.rank), WORLD_SIZE=str(ranks.count), LOCAL_RANK=str(ranks.device.index or 0), LOCAL_SIZE="1"
    )
    dist.init_process_group(
        backend="gloo" if ranks.device.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{ranks.rendezvous}",
        rank=ranks.rank,
        world_size=ranks.count,
        timeout=timedelta(seconds=ranks.timeout_s),
    )


def import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at start: half a minute, and a C++ compiler needed.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


class Trainer:
    """One DeepSpeed engine over a module whose forward gives log-probabilities.

    Use: for each gradient step, :meth:`backward` exactly ``micro_steps`` times, then read :meth:`step`.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions, ranks: Ranks) -> None:
        deepspeed = import_deepspeed(ranks.device)
        if not dist.is_initialized():
            join_ranks(ranks)
        self._ranks = ranks
        self._options = options
        self._deepspeed = deepspeed
        model.to(ranks.device)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            # Torch's own vectorized step on the CPU; DeepSpeed's would have to be compiled first.
            fused=options.offloads_optimizer or None,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(options, ranks), dist_init_required=False
        )
        # A script of DeepSpeed's that it would copy into every checkpoint.
        self._engine._copy_recovery_script = lambda path: None
        self._has_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        self._num_steps = 0
        self._grad_norm = math.nan
        self._set_lr()

    def forward(self, batch: Any) -> Any:
        """The module's forward, inside DeepSpeed."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch; the gradient of a step is the sum over all micro-batches and ranks.

        DeepSpeed averages over both, which is undone here.
        """
        self._engine.backward(loss * (self._options.micro_steps * self._ranks.count))
        if self._engine.is_gradient_accumulation_boundary():
            self._grad_norm = self._local_grad_norm()
        self._engine.step()

    def _local_grad_norm(self) -> float:
        """The gradient's norm where DeepSpeed keeps none (float32 without ZeRO: each rank holds the whole gradient)."""
        if hasattr(self._optimizer, "_global_grad_norm"):
            return math.nan
        norms = [parameter.grad.norm() for parameter in self._engine.module.parameters() if parameter.grad is not None]
        return float(torch.stack(norms).norm())

    def step(self) -> StepResult:
        """Close a gradient step after its last :meth:`backward`, in which DeepSpeed has stepped."""
        lr = self._lr()
        norm = self._engine.get_global_grad_norm()
        self._num_steps += 1
        self._set_lr()
        return StepResult(lr=lr, grad_norm=self._grad_norm if norm is None else float(norm))

    def _lr(self) -> float:
        options = self._options
        return options.lr * schedule_factor(
            self._num_steps, schedule=options.schedule, num_steps=options.num_steps, warmup_ratio=options.warmup_ratio
        )

    def _set_lr(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr()

    def add_up(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks (float64); the one small collective by which ranks agree."""
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        result: list[float] = totals.tolist()
        return result

    def maximum(self, value: float) -> float:
        """The largest ``value`` of all ranks."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each rank gave, in rank order, on every rank."""
        if self._ranks.count == 1:
            return [data]
        size = torch.tensor([len(data)])
        sizes = [torch.zeros_like(size) for _ in range(self._ranks.count)]
        dist.all_gather(sizes, size)
        longest = max(1, *(int(s) for s in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [part[: int(s)].numpy().tobytes() for part, s in zip(parts, sizes, strict=True)]

    @property
    def gathers_weights(self) -> bool:
        """Whether whole parameters are put together from all ranks, which then must ask for them together."""
        return self._options.zero_stage == 3

    @contextlib.contextmanager
    def whole_parameters(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        """Give out full parameters by name; under ZeRO-3 these are gathered on entry and released on exit."""
        parameters = dict(self._engine.module.named_parameters())
        chosen = {name: parameters[name] for name in names}
        if self.gathers_weights:
            with self._deepspeed.zero.GatheredParameters(list(chosen.values())):
                yield lambda name: chosen[name].data
        else:
            yield lambda name: chosen[name].data

    def save(self, folder: Path, open_file: Callable[[str], AbstractContextManager[BinaryIO]]) -> None:
        """Write everything that the next gradient step depends on and that it changes; all ranks together.

        ``open_file`` opens a new file by its path within ``folder``, which every rank can see.
        """
        self._engine.checkpoint_engine = state_files(folder, open_file)
        self._engine.save_checkpoint(
            str(folder),
            tag=STATE_FOLDER,
            client_state={"oatlite_num_steps": self._num_steps},
            save_latest=False,
            exclude_frozen_parameters=self._has_frozen,
        )

    def load(self, folder: Path) -> None:
        """Take over what :meth:`save` wrote with as many ranks and the same options. Nothing in it is executed."""
        self._engine.checkpoint_engine = state_files(folder, None)
        _, client_state = self._engine.load_checkpoint(
            str(folder), tag=STATE_FOLDER, load_module_strict=not self._has_frozen
        )
        self._num_steps = int(client_state["oatlite_num_steps"])
        self._set_lr()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def state_files(folder: Path, open_file: Callable[[str], AbstractContextManager[BinaryIO]] | None) -> Any:
    """DeepSpeed's way to files: written through ``open_file``, read without running what lies in them."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class StateFiles(CheckpointEngine):  # type: ignore[misc]
        def create(self, info: Any) -> None: ...

        def save(self, state_dict: Any, path: str) -> None:
            assert open_file is not None
            with open_file(str(Path(path).relative_to(folder))) as file:
                torch.save(state_dict, file)

        def load(self, path: str, map_location: Any = None) -> Any:
            known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
            try:
                with torch.serialization.safe_globals(known):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except (OSError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of many kinds, by what is wrong
                raise CheckpointError(
                    f"{path} holds what no checkpoint of ours does ({type(error).__name__}), and is not read",
                    "add --from-step with another one",
                ) from error

        def commit(self, info: Any) -> bool:
            return True

    return StateFiles()


def deepspeed_config(options: OptimizerOptions, ranks: Ranks) -> dict[str, Any]:
    """What DeepSpeed is started with."""
    zero: dict[str, Any] = {"stage": options.zero_stage}
    host = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    if options.offloads_optimizer:
        zero["offload_optimizer"] = host
    if options.offloads_parameters:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_steps,
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "fp16": {"enabled": options.dtype == "float16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # A sum over many micro-batches in bfloat16 would lose the late ones.
        "data_types": {"grad_accum_dtype": "fp32" if options.zero_stage else None},
        "steps_per_print": 10**9,
    }

"""TRL's trainers with our schedule and evaluation, and what happens at a training's steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oatlite.checkpoint import CheckpointWriter, prune
from oatlite.errors import ConfigError
from oatlite.finetuning.options import RankSpec, TuningOptions
from oatlite.fitting import Report, Schedule, token_batches
from oatlite.metrics.sinks import Sink

_NUM_KEPT = 2  # the newest may come to harm


def trainer_class(options: TuningOptions) -> type:
    """A trainer of TRL with ``measure()``, which gives the held-out metric over all ranks, and ``held_out`` to set."""
    from trl import RewardTrainer, SFTTrainer

    class Policy(_PolicyMeasure, _Ways, SFTTrainer):  # type: ignore[misc]
        pass

    class Reward(_RewardMeasure, _Ways, RewardTrainer):  # type: ignore[misc]
        pass

    return Policy if options.task == "policy" else Reward


class _Ways:
    """What a trainer of TRL does differently here. ``counts`` is called as each batch begins."""

    counts: Callable[[], None] = staticmethod(lambda: None)

    def training_step(self, *inputs: Any, **more: Any) -> Any:
        self.counts()
        return super().training_step(*inputs, **more)  # type: ignore[misc]

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *_: object, **__: object) -> None: ...

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = Schedule(lr=self.args.learning_rate)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: schedule.factor(step, num_training_steps),
            )
        if self.is_deepspeed_enabled:
            self._read_state_as_data()
        return self.lr_scheduler

    def _read_state_as_data(self: Any) -> None:
        """DeepSpeed's own way to files executes what it reads. The engine exists and has read no checkpoint yet."""
        from oatlite.trainer import state_files

        root = Path(self.args.output_dir)
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        engine.checkpoint_engine = state_files(root, lambda name: (root / name).open("wb"))

    def evaluate(self: Any, *_: object, **__: object) -> dict[str, float]:
        metrics = {self.metric: self.measure()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean(self: Any, sums: Sequence[tuple[float, float]]) -> float:
        """The quotient of the sums of two columns over all batches of all ranks."""
        totals = torch.tensor(sums, dtype=torch.float64).sum(0).float().to(self.accelerator.device)
        top, bottom = self.accelerator.reduce(totals, reduction="sum").tolist()
        return top / bottom

    def _my_batches(self: Any, lengths: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """This rank's batches of held-out rows; each rank has as many, those that make up the number not counted."""
        tokens = self.args.per_device_train_batch_size * max(lengths)
        batches = token_batches(lengths, tokens, None)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for start in range(0, len(batches), ranks):
            mine = start + rank
            self.counts()
            yield batches[min(mine, len(batches) - 1)], mine < len(batches)

    @contextlib.contextmanager
    def _evaluating(self: Any) -> Iterator[Any]:
        was_training = self.model.training
        self.model_wrapped.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield self.model_wrapped
        finally:
            self.model_wrapped.train(was_training)


class _PolicyMeasure:
    metric = "eval_loss"

    def measure(self: Any) -> float:
        """Held-out loss in nats per token that is trained on: all tokens of all rows weigh the same."""
        rows = self.held_out
        sums = []
        with self._evaluating() as model:
            for batch, is_counted in self._my_batches([len(row["input_ids"]) for row in rows]):
                keys = ("input_ids", "labels")
                inputs = self._prepare_inputs(self._collate_apart([{k: rows[i][k] for k in keys} for i in batch]))
                found = model(**inputs, use_cache=False, fused_lm_head=True)
                weight = float(is_counted)
                sums.append((-found.log_probs.sum().item() * weight, found.label_mask.sum().item() * weight))
        return self._mean(sums)

    def _collate_apart(self: Any, rows: list[dict[str, list[int]]]) -> Any:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=self.data_collator.pad_token_id)(rows)

    def check_packing(self: Any, rows: Sequence[Sequence[int]]) -> None:
        """Raise ConfigError if a row's log-probabilities depend on the row that is packed before it."""
        first, second = list(rows[0]), list(rows[1])
        other = [*second, *first, *second] * len(first)
        packed = [first + second, other[: len(first)] + second]
        found = []
        with self._evaluating() as model:
            for tokens in packed:
                positions = [*range(len(first)), *range(len(second))]
                inputs = {"input_ids": [tokens], "labels": [tokens], "position_ids": [positions]}
                tensors = {key: torch.tensor(value, device=self.accelerator.device) for key, value in inputs.items()}
                found.append(model(**tensors, use_cache=False, fused_lm_head=True).log_probs[0, len(first) :])
            only = torch.tensor([second], device=self.accelerator.device)
            alone = model(input_ids=only, labels=only, use_cache=False, fused_lm_head=True).log_probs[0]
        is_precise = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        leaks = not torch.allclose(found[0], found[1], atol=1e-4)
        differs = not torch.allclose(found[0], alone, atol=1e-3 if is_precise else 0.5)
        if leaks or differs:
            raise ConfigError(
                f"--packing: attention of {type(self.model).__name__} does not keep packed rows apart",
                "leave --packing out",
            )


class _RewardMeasure:
    metric = "eval_accuracy"

    def measure(self: Any) -> float:
        """The share of held-out pairs whose chosen text has the higher reward."""
        rows = self.held_out
        sums = []
        with self._evaluating() as model:
            lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
            for batch, is_counted in self._my_batches(lengths):
                inputs = self._prepare_inputs(self.data_collator([rows[i] for i in batch]))
                rewards = model(**inputs, use_cache=False).logits[:, 0]
                chosen, rejected = rewards.chunk(2)
                # Not a number goes into the sum: a rank that left here would leave the others waiting.
                num_right = float((chosen > rejected).sum()) if bool(rewards.isfinite().all()) else math.nan
                weight = float(is_counted)
                sums.append((num_right * weight, len(batch) * weight))
        return self._mean(sums)


class Watcher(TrainerCallback):  # type: ignore[misc]
    """Progress, evaluation and checkpoints at their steps, and the end of a training that diverges."""

    def __init__(self, spec: RankSpec, report: Report, sinks: Sequence[Sink] = ()) -> None:
        self.trainer: Any = None
        self._spec = spec
        self._report = report
        self._sinks = sinks
        self._smoothed = math.nan
        self._held_out = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._spec.options.packing:
            rows = self.trainer.held_out + list(self.trainer.train_dataset.select(range(1)))
            self.trainer.check_packing([row["input_ids"][:32] for row in rows[:2]])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        habits = self._spec.habits
        is_last = state.global_step >= state.max_steps
        control.should_log = True
        control.should_evaluate = bool(habits.eval_every) and state.global_step % habits.eval_every == 0 and not is_last
        control.should_save = state.global_step % habits.save_every == 0 and not is_last

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise ConfigError(f"the loss is {loss} at step {state.global_step} of {state.max_steps}", "lower --lr")
        self._record({"kind": "step", "step": state.global_step, **logs})
        self._smoothed = loss if math.isnan(self._smoothed) else 0.95 * self._smoothed + 0.05 * loss
        figures = f"loss {self._smoothed:.3f}{self._held_out}"
        self._report(self._spec.options.task, state.global_step, state.max_steps, figures)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        name, value = next((name.removeprefix("eval_"), value) for name, value in metrics.items())
        self._record({"kind": "eval", "step": state.global_step, name: value})
        self._held_out = f", held-out {name} {value:.3f}"
        figures = f"loss {self._smoothed:.3f}{self._held_out}"
        self._report(self._spec.options.task, state.global_step, state.max_steps, figures)

    def _record(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            root, step = Path(args.output_dir), state.global_step
            writer = CheckpointWriter(root, step, or_else="")
            writer.adopt(root / f"checkpoint-{step}")
            writer.complete(step, writer.records, {})
            prune(root, _NUM_KEPT)

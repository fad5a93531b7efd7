"""One rank of a training by TRL: arguments, evaluation, checkpoints, and what is saved."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from oatlite.errors import CheckpointError, ConfigError, OatliteError, StorageError
from oatlite.finetuning import COMPLETE, RankSpec, TuningOptions, TuningResult
from oatlite.fitting import Report, Schedule, token_batches
from oatlite.pretrained import give_pad_token, load_pretrained
from oatlite.sources import first_line

if TYPE_CHECKING:
    import peft

_IGNORED = -100
_ALL_LINEAR = "all-linear"
_PR_SET_PDEATHSIG = 1


def train_rank(training: Dataset, held_out: Dataset, spec: RankSpec, report: Report) -> TuningResult:
    """Train as one of ``spec.options.ranks`` ranks; rank 0 saves the model into ``spec.folder``.

    Raises ConfigError, CheckpointError and StorageError.
    """
    with _quiet():
        trainer = _make_trainer(training, held_out, spec, report)
        try:
            trainer.train(resume_from_checkpoint=spec.resume_from)
        except OSError as error:
            raise StorageError(f"a checkpoint cannot be written or read: {error.strerror or first_line(error)}") from error
        metric = trainer.measure()
        if not math.isfinite(metric):
            raise ConfigError(f"the held-out loss is {metric}: nothing is saved", "lower --lr")
        num_parameters = _save(trainer, spec)
        return TuningResult(held_out=metric, num_parameters=num_parameters)


def load_base(options: TuningOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as it is before training, and its tokenizer. Equal options give equal weights, new ones included."""
    torch.manual_seed(options.seed)
    # Frozen weights need no more precision than the forward pass has.
    dtype = getattr(torch, options.dtype) if options.lora_rank else torch.float32
    if options.task == "policy":
        return load_pretrained(AutoModelForCausalLM, options.model, options.max_tokens, dtype=dtype)
    model, tokenizer = load_pretrained(
        AutoModelForSequenceClassification,
        options.model,
        options.max_tokens,
        new_heads=("score",),
        dtype=dtype,
        num_labels=1,
    )
    if not hasattr(model, "score"):
        raise ConfigError(f"--model {options.model} is no decoder", "name a decoder language model")
    give_pad_token(model, tokenizer)
    tokenizer.padding_side = "right"
    return model, tokenizer


def _make_trainer(training: Dataset, held_out: Dataset, spec: RankSpec, report: Report) -> Any:
    from transformers import PrinterCallback

    options = spec.options
    arguments = _arguments(spec)  # first of all, because ZeRO-3 loads models in parts once they exist
    model, tokenizer = load_base(options)
    trainer_class = _trainer_class(options)
    if options.packing:
        from trl import pack_dataset

        training = pack_dataset(training, options.max_tokens, "bfd")
    callback = _Watcher(spec, report)
    adapter = {"peft_config": _adapter_config(options)} if options.lora_rank else {}
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=training,
        processing_class=tokenizer,
        callbacks=[callback],
        **adapter,
    )
    trainer.held_out = list(held_out)
    callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_class(options: TuningOptions) -> type:
    from trl import RewardTrainer, SFTTrainer

    class Policy(_PolicyMeasure, _Ways, SFTTrainer):  # type: ignore[misc]
        pass

    class Reward(_RewardMeasure, _Ways, RewardTrainer):  # type: ignore[misc]
        pass

    return Policy if options.task == "policy" else Reward


class _Ways:
    """What a trainer of TRL does differently here."""

    def _send_telemetry(self) -> None: ...

    def create_model_card(self, *_: object, **__: object) -> None: ...

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = Schedule(lr=self.args.learning_rate)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: schedule.factor(step, num_training_steps),
            )
        return self.lr_scheduler

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
                inputs = self._prepare_inputs(self.data_collator_of_rows([{k: rows[i][k] for k in keys} for i in batch]))
                found = model(**inputs, use_cache=False, fused_lm_head=True)
                weight = float(is_counted)
                sums.append((-found.log_probs.sum().item() * weight, found.label_mask.sum().item() * weight))
        return self._mean(sums)

    def data_collator_of_rows(self: Any, rows: list[dict[str, list[int]]]) -> Any:
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
            tokens = torch.tensor([second], device=self.accelerator.device)
            alone = model(input_ids=tokens, labels=tokens, use_cache=False, fused_lm_head=True).log_probs[0]
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
                if not bool(rewards.isfinite().all()):
                    return math.nan
                chosen, rejected = rewards.chunk(2)
                weight = float(is_counted)
                sums.append((float((chosen > rejected).sum()) * weight, len(batch) * weight))
        return self._mean(sums)


class _Watcher(TrainerCallback):
    """Progress, evaluation and checkpoints at their steps, and the end of a training that diverges."""

    def __init__(self, spec: RankSpec, report: Report) -> None:
        self.trainer: Any = None
        self._spec = spec
        self._report = report
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
        self._smoothed = loss if math.isnan(self._smoothed) else 0.95 * self._smoothed + 0.05 * loss
        figures = f"loss {self._smoothed:.3f}{self._held_out}"
        self._report(self._spec.options.task, state.global_step, state.max_steps, figures)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        name, value = next(iter(metrics.items()))
        self._held_out = f", held-out {name.removeprefix('eval_')} {value:.3f}"
        figures = f"loss {self._smoothed:.3f}{self._held_out}"
        self._report(self._spec.options.task, state.global_step, state.max_steps, figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def _arguments(spec: RankSpec) -> Any:
    from trl import RewardConfig, SFTConfig

    options, habits = spec.options, spec.habits
    if habits.wandb:
        os.environ.setdefault("WANDB_PROJECT", "oatlite")
        os.environ.setdefault("WANDB_DIR", str(Path(spec.checkpoints).parent))
    deepspeed = None
    if options.zero_stage is not None:
        from oatlite.trainer import import_deepspeed

        import_deepspeed(torch.device("cpu" if options.use_cpu else "cuda"))
        deepspeed = _deepspeed_config(options)
    # DeepSpeed finds the CPU by itself; told of it, the libraries around it would leave DeepSpeed out.
    use_cpu = options.use_cpu and deepspeed is None
    common: dict[str, Any] = {
        "output_dir": spec.checkpoints,
        "run_name": Path(spec.checkpoints).stem,
        "num_train_epochs": options.epochs,
        "max_steps": options.steps or -1,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.batch_size // (options.micro_batch_size * options.ranks),
        "learning_rate": options.lr,
        "adam_beta2": 0.95,
        "weight_decay": Schedule(lr=options.lr).weight_decay,
        "max_grad_norm": Schedule(lr=options.lr).max_grad_norm,
        "optim": "adamw_torch" if deepspeed else "adamw_torch_fused",
        "bf16": options.dtype == "bfloat16",
        "use_cpu": use_cpu,
        "ddp_backend": "gloo" if use_cpu and options.ranks > 1 else None,
        "deepspeed": deepspeed,
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "eval_strategy": "no",
        "save_strategy": "no",
        "save_total_limit": 2,  # the newest may be torn
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": ["wandb"] if habits.wandb else [],
        "seed": options.seed,
        "dataloader_pin_memory": not options.use_cpu,
    }
    if options.task == "reward model":
        return RewardConfig(**common, max_length=None, disable_dropout=True)
    # The rows have their labels, fit, and are packed already.
    return SFTConfig(
        **common,
        max_length=options.max_tokens if options.packing else None,
        packing=options.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _deepspeed_config(options: TuningOptions) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.batch_size // (options.micro_batch_size * options.ranks),
        "gradient_clipping": Schedule(lr=options.lr).max_grad_norm,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "zero_optimization": {"stage": options.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _adapter_config(options: TuningOptions) -> peft.LoraConfig:
    import peft

    is_policy = options.task == "policy"
    return peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=_ALL_LINEAR,
        task_type="CAUSAL_LM" if is_policy else "SEQ_CLS",
        modules_to_save=None if is_policy else ["score"],
    )


def _save(trainer: Any, spec: RankSpec) -> int:
    """Write the whole model, its tokenizer and, of LoRA, the adapter; all ranks together. Gives its parameters."""
    options, folder = spec.options, Path(spec.folder)
    try:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.is_world_process_zero():
            trainer.accelerator.wait_for_everyone()
            return 0
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if options.lora_rank:
            model.peft_config["default"].base_model_name_or_path = options.model
            model.save_pretrained(folder / "adapter", state_dict=state)
            model = _merge(folder / "adapter", options)
            state = model.state_dict()
        state = {name: tensor.to(getattr(torch, options.dtype)) for name, tensor in state.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise ConfigError("the weights are not finite any more: nothing is saved", "lower --lr")
        model.config.dtype = getattr(torch, options.dtype)
        model.save_pretrained(folder, state_dict=state)
        trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
        return int(sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
    except OSError as error:
        raise StorageError(f"cannot write the model: {error.strerror or first_line(error)}") from error


def _merge(adapter: Path, options: TuningOptions) -> Any:
    """The base, loaded anew and in float32, with the adapter added to its weights."""
    import peft
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if options.zero_stage is not None:
        unset_hf_deepspeed_config()  # or ZeRO-3 would give this model out in parts, too
    base, _ = load_base(dataclasses.replace(options, dtype="float32"))
    return peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings and bars are about their own defaults, which nobody who reads our screen has chosen."""
    import datasets.utils
    from transformers.utils import logging as hf_logging

    level, had_bars = hf_logging.get_verbosity(), not datasets.utils.are_progress_bars_disabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.utils.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
        if had_bars:
            datasets.utils.enable_progress_bars()


def main(path: str) -> int:
    """Run one rank of several on a written :class:`RankSpec`; an error goes into a file of its own."""
    # The elastic launcher puts each rank into a session of its own; without this a rank would outlive it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = RankSpec.read(Path(path))
    private, rank = Path(spec.private), int(os.environ["RANK"])

    def report(stage: str, done: int, total: int, figures: str) -> None:
        if rank == 0:
            with (private / "progress.jsonl").open("a") as progress:
                progress.write(json.dumps([stage, done, total, figures]) + "\n")

    try:
        parts = (Dataset.load_from_disk(str(private / name)) for name in ("training", "held-out"))
        result = train_rank(*parts, spec, report)
        if rank == 0:
            (private / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
    except OatliteError as error:
        told = {"exit_code": error.exit_code, "message": error.message, "fix": error.fix}
        (private / f"error-{rank}.json").write_text(json.dumps(told))
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

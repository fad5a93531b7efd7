"""What TRL's trainers are told: their arguments, and DeepSpeed's configuration where a ZeRO stage is asked for."""

from __future__ import annotations

import os
from typing import Any

import torch

from oatlite.finetuning.options import RankSpec, TuningOptions
from oatlite.fitting import Schedule


def training_arguments(spec: RankSpec) -> Any:
    """The ``SFTConfig`` or ``RewardConfig`` of one rank. With ZeRO-3 a model that is loaded later comes in parts."""
    from trl import RewardConfig, SFTConfig

    options = spec.options
    deepspeed = None
    if options.zero_stage is not None:
        from oatlite.trainer import import_deepspeed

        import_deepspeed(torch.device("cpu" if options.use_cpu else "cuda"))
        deepspeed = _deepspeed_config(options)
        if options.use_cpu:
            _meet_by_gloo()
    # DeepSpeed finds the CPU by itself; told of it, the libraries around it would leave DeepSpeed out.
    use_cpu = options.use_cpu and deepspeed is None
    common: dict[str, Any] = {
        "output_dir": spec.checkpoints,
        "num_train_epochs": 1,  # the rows come in their order, which has all epochs in it
        "train_sampling_strategy": "sequential",
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
        "accelerator_config": {"use_configured_state": options.use_cpu and deepspeed is not None},
        "deepspeed": deepspeed,
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": [],  # Weights & Biases hears of it in a way that cannot hang the training
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


def _meet_by_gloo() -> None:
    """With DeepSpeed on a CPU: accelerate by itself finds no backend there, and takes each rank for the only one."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


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

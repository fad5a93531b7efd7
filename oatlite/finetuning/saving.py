"""The end of a training: the whole model in a folder, and of LoRA the adapter beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oatlite.errors import ConfigError, StorageError
from oatlite.finetuning.options import RankSpec, TuningOptions
from oatlite.finetuning.pretrained import load_base
from oatlite.sources import first_line

if TYPE_CHECKING:
    import peft

_ALL_LINEAR = "all-linear"


def adapter_config(options: TuningOptions) -> peft.LoraConfig:
    import peft

    is_policy = options.task == "policy"
    return peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=_ALL_LINEAR,
        task_type="CAUSAL_LM" if is_policy else "SEQ_CLS",
        modules_to_save=None if is_policy else ["score"],
    )


def save(trainer: Any, spec: RankSpec) -> int:
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

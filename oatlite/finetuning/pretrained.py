"""Models and tokenizers to go on from: loaded, checked and made ready for training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oatlite.errors import ConfigError
from oatlite.finetuning.options import Task, TuningOptions
from oatlite.model_checks import check_language_model
from oatlite.sources import find_local, first_line
from oatlite.tiny import PAD, TINY_NAMES

_FIX = f"name a model folder, a hub id or {' or '.join(TINY_NAMES)}"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError for what is no model with a tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a file of somebody else's raises
        raise ConfigError(f"--model {path} cannot be loaded: {first_line(error)}", _FIX) from error


def check_model(task: Task, path: str, max_tokens: int) -> None:
    """Raise ConfigError if there is no model, it has fewer positions than ``max_tokens``, or a policy would be made of
    what is no language model; loads no weights."""
    folder = find_local(path, "the model")
    if folder is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"--model {path} has no config.json", _FIX)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever a file of somebody else's raises
        raise ConfigError(f"--model {path} cannot be loaded: {first_line(error)}", _FIX) from error
    if task == "policy":
        check_language_model(path, "--model", trust_remote_code=False)
    check_positions(config, max_tokens)


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


def load_pretrained(
    auto_class: Any, path: str, max_tokens: int, *, new_heads: tuple[str, ...] = (), dtype: torch.dtype, **more: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of ``auto_class`` and its tokenizer; only modules of ``new_heads`` may be without weights.

    Raises ConfigError for what is no such model or has fewer positions than ``max_tokens``.
    """
    tokenizer = load_tokenizer(path)
    try:
        model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **more)
    except Exception as error:  # whatever a file of somebody else's raises
        raise ConfigError(f"--model {path} cannot be loaded: {first_line(error)}", _FIX) from error
    missing = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in new_heads)
    if missing:
        raise ConfigError(f"--model {path} has no weights for {', '.join(missing[:3])}", "is it another kind of model?")
    check_positions(model.config, max_tokens)
    return model, tokenizer


def check_positions(config: Any, max_tokens: int) -> None:
    """Raise ConfigError if a model has fewer positions than a row may have tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_tokens > limit:
        raise ConfigError(f"--max-tokens {max_tokens} is more than the model's {limit} positions", "lower --max-tokens")


def give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that padding differs from EOS: the head scores the last token that is not padding, which is EOS."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.config.pad_token_id = tokenizer.pad_token_id

"""What a folder or a hub id has to hold to serve as a language model, told from its configuration and its headers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from oatlite.data import load_tokenizer
from oatlite.errors import ConfigError
from oatlite.sources import find_local, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "*.bin")


def check_language_model(
    path: str, what: str, *, trust_remote_code: bool
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of the decoder at ``path``, a folder or a hub id.

    ``what`` names it in errors. Raises ConfigError where it is none, has no weights, or a tokenizer that does not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = find_local(path, what)
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a configuration of somebody else's raises
        where = "in the folder" if folder else "as a hub id, and there is no such folder"
        raise ConfigError(
            f"{what} {path} has no usable configuration {where}: {first_line(error)}", "give a model folder or a hub id"
        ) from error
    architectures = model.architectures or []
    is_causal = any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in architectures)
    if not is_causal and "AutoModelForCausalLM" not in (getattr(model, "auto_map", None) or {}):
        raise ConfigError(
            f"{what} {path} is {', '.join(architectures) or 'of no architecture'}", "give a decoder language model"
        )
    check_weights(path, what)
    tokenizer = load_tokenizer(path, trust_remote_code)
    if len(tokenizer) > model.get_text_config().vocab_size:
        raise ConfigError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model {model.get_text_config().vocab_size}",
            "save the model after resize_token_embeddings",
        )
    return model, tokenizer


def max_positions(model: PretrainedConfig) -> float:
    """Prompt and response tokens that the model can take; without bound for one without positions."""
    return getattr(model.get_text_config(), "max_position_embeddings", None) or math.inf


def check_weights(path: str, what: str) -> None:
    """That a local folder has weights, and that their headers can be read. A hub id is left to its download."""
    folder = Path(path)
    if not folder.is_dir():
        return
    files = [file for pattern in WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        raise ConfigError(f"{what} {path} has no weights", f"the folder needs {' or '.join(WEIGHTS)}")
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "np"):
                    pass
            except Exception as error:  # of a type that safetensors keeps to itself
                raise ConfigError(
                    f"{file} is no complete safetensors file: {first_line(error)}", "save it again"
                ) from None

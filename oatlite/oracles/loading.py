"""What every oracle that is a model is loaded from: a configuration, a tokenizer and a dtype."""

from __future__ import annotations

from typing import Any

import torch

from oatlite.errors import ConfigError
from oatlite.sources import find_local, first_line

TRAIN_ONE = "type a reward model, such as one made by: oatlite reward-model"
PAIRRM_PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")


def read_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model at ``path``, a folder or a hub id. Raises ConfigError when there is none."""
    from transformers import AutoConfig

    find_local(path, "the reward model")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a configuration of somebody else's raises
        raise ConfigError(f"the reward model {path} cannot be loaded: {first_line(error)}", TRAIN_ONE) from error


def is_pairrm(config: Any) -> bool:
    """Whether it describes a PairRM, published or trained further, rather than a classifier."""
    return config.model_type == "deberta-v2" and all(hasattr(config, name) for name in PAIRRM_PREFIXES)


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of somebody else's makes a tokenizer raise
        raise ConfigError(
            f"the reward model {path} has no usable tokenizer: {first_line(error)}",
            "copy tokenizer.json into its folder",
        ) from error

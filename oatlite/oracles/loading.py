"""What every oracle that is a model is loaded from: a configuration, a tokenizer and a dtype."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oatlite.errors import ConfigError, OracleError
from oatlite.sources import find_local, first_line

TRAIN_ONE = "type a reward model, such as one made by: oatlite reward-model"
PAIRRM_PREFIXES = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
MAX_TOKENS, PAIRRM_MAX_TOKENS = 1024, 2048
"""Where nothing is asked for; PairRM's is that of its training: 1224 tokens of prompt and 412 of each response."""
POSITIONS_AFTER_PADDING = ("camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Encoders that count positions from the one after ``pad_token_id``, so that not all of them hold a token."""


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


def token_limit(asked: int | None, config: Any) -> int:
    """The longest sequence that a model scores: ``asked``, or the default, within the positions that it has."""
    if is_pairrm(config):  # its positions are relative
        return asked or PAIRRM_MAX_TOKENS
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and text.model_type in POSITIONS_AFTER_PADDING:
        positions -= text.pad_token_id + 1
    return min(asked or MAX_TOKENS, positions or sys.maxsize)


@contextmanager
def out_of_memory_told(what: str, batch_tokens: int) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into an OracleError that names the option to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OracleError(
            f"{what} runs out of memory in a batch of {batch_tokens} tokens",
            f"lower oracle.batch_tokens, as in oracle.batch_tokens = {max(1, batch_tokens // 2)}",
        ) from error


def require_finite(values: npt.NDArray[np.floating], what: str) -> None:
    """Raises OracleError where a model gave something that is no number, as float16 does past its range."""
    if not np.isfinite(values).all():
        raise OracleError(f"{what} that are not finite", "try oracle.dtype = float32")


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def unused_template(path: str, tokenizer: Any, chat_template: bool | None) -> str:
    """What to say of a reward model whose chat template nobody asked for and nobody declined; nothing of another."""
    if chat_template is not None or getattr(tokenizer, "chat_template", None) is None:
        return ""
    return (
        f"the reward model {path} has a chat template, and reads plain text: if it was trained with the template its "
        "rewards mean nothing without; set oracle.chat_template = true, or false to keep plain text"
    )


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of somebody else's makes a tokenizer raise
        raise ConfigError(
            f"the reward model {path} has no usable tokenizer: {first_line(error)}",
            "copy tokenizer.json into its folder",
        ) from error

"""Models and prompts of the commands that generate, checked before a process is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oatlite.config.schema import Config
from oatlite.data import PromptSet, load_all_prompts
from oatlite.errors import ConfigError
from oatlite.model_checks import check_language_model, max_positions
from oatlite.preflight import check_engine, check_lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def check_model(config: Config, path: str, what: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a model that vLLM is to run. Raises ConfigError."""
    check_engine(config)
    return check_language_model(path, what, trust_remote_code=config.model.trust_remote_code)


def check_same_vocabulary(
    ours: tuple[PretrainedConfig, PreTrainedTokenizerBase],
    theirs: tuple[PretrainedConfig, PreTrainedTokenizerBase],
    path: str,
    what: str,
) -> None:
    """Raise ConfigError where the model ``what`` at ``path`` reads token ids otherwise than ours."""
    sizes = [model.get_text_config().vocab_size for model, _ in (theirs, ours)]
    if sizes[0] != sizes[1] or ours[1].get_vocab() != theirs[1].get_vocab():
        raise ConfigError(
            f"{what} {path} has another vocabulary than the model ({sizes[0]} and {sizes[1]} tokens)",
            "give a model of the same family",
        )


def read_prompts(
    config: Config, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, needs_references: bool
) -> PromptSet:
    """The prompts as ``tokenizer`` writes them, each with room for a response. Raises ConfigError."""
    prompts = load_all_prompts(config.data, tokenizer, needs_references=needs_references)
    longest = max(map(len, prompts.tokens))
    check_lengths(config, longest, config.sampling.max_new_tokens, max_positions(model), "sampling.max_new_tokens")
    return prompts

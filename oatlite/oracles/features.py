"""Features of a prompt with a response, for the epistemic reward head: what an encoder knows, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from oatlite.config.flags import to_type
from oatlite.config.schema import Config
from oatlite.continuations import join
from oatlite.errors import ConfigError
from oatlite.oracles.base import Floats, PreferenceOracle
from oatlite.oracles.conversations import as_text
from oatlite.oracles.loading import (
    is_pairrm,
    load_tokenizer,
    out_of_memory_told,
    read_config,
    require_finite,
    token_limit,
    torch_dtype,
)
from oatlite.oracles.sequences import Tokens, batches, longest_first, model_inputs, text_pairs
from oatlite.sources import first_line


@runtime_checkable
class Encodes(Protocol):
    def features(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """(B, D) float32, in order; NaN for a response that is too long."""
        ...


def build_encoder(config: Config, oracle: PreferenceOracle, *, device: str) -> Encodes:
    """What ``explore.encoder`` names, and the oracle's own encoder where it names none or the same.

    Raises ConfigError for an oracle that has none, or a model that cannot be loaded.
    """
    path = config.explore.encoder
    if path is None or (path,) == config.oracle.path:
        if not isinstance(oracle, Encodes):
            raise ConfigError(
                f"the oracle {', '.join(config.oracle.path)} gives no features",
                f"type {to_type('explore.encoder', 'MODEL')}",
            )
        return oracle
    if is_pairrm(read_config(path)):
        from oatlite.oracles.pairrm import PairRMOracle

        return PairRMOracle(
            path,
            max_tokens=config.oracle.max_tokens,
            batch_tokens=config.oracle.batch_tokens,
            dtype=config.oracle.dtype,
            device=device,
        )
    return ModelEncoder(
        path,
        max_tokens=config.oracle.max_tokens,
        batch_tokens=config.oracle.batch_tokens,
        dtype=config.oracle.dtype,
        device=device,
    )


class ModelEncoder:
    """Any Hugging Face model without its head: the last hidden state of a decoder's last token, or of an encoder's
    first. A decoder reads prompt and response as one text, an encoder as two; in batches of at most ``batch_tokens``
    padded tokens."""

    def __init__(
        self,
        path: str,
        *,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModel
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        self.path = path
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(path)
        try:
            model: Any = AutoModel.from_pretrained(path, dtype=torch_dtype(dtype, self.device))
        except Exception as error:  # torn weights, an architecture that this version cannot load
            raise ConfigError(
                f"the encoder {path} cannot be loaded: {first_line(error)}",
                f"type {to_type('explore.encoder', 'ANOTHER')}",
            ) from error
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.max_tokens = token_limit(max_tokens, model.config)
        self.batch_tokens = batch_tokens
        self._is_decoder = model.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _is_bidirectional(model)

    @torch.inference_mode()
    def features(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """See :meth:`Encodes.features`."""
        from oatlite.oracles.reward_model import pooled_states

        sequences = self._tokens([as_text(prompt) for prompt in prompts], responses)
        found = np.full((len(sequences), self.model.config.get_text_config().hidden_size), np.nan, np.float32)
        lengths = [len(tokens.ids) for tokens in sequences]
        fitting = [i for i in longest_first(lengths) if 0 < lengths[i] <= self.max_tokens]
        for batch in batches(fitting, lengths, self.batch_tokens):
            inputs = model_inputs([sequences[i] for i in batch], self.device)
            with out_of_memory_told(f"the encoder {self.path}", self.batch_tokens):
                states = pooled_states(self.model, inputs, is_decoder=self._is_decoder)
                found[batch] = states.float().cpu().numpy()
            require_finite(found[batch], f"the encoder {self.path} gave states")
        return found

    def _tokens(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Tokens]:
        if not self._is_decoder:
            return text_pairs(self.tokenizer, self.model, prompts, responses)
        texts = [prompt + (join(prompt, text) if text else "") for prompt, text in zip(prompts, responses, strict=True)]
        return [Tokens(self.tokenizer(text, verbose=False)["input_ids"]) for text in texts]


def _is_bidirectional(model: Any) -> bool:
    """Encoders such as BERT can be made decoders of, and are listed as such."""
    return hasattr(model.config, "is_decoder") and not model.config.is_decoder and "bert" in model.config.model_type

"""Policies and references: loading them, saving them, and the forward pass over pairs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oatlite.errors import ConfigError
from oatlite.layouts import ForwardBatch
from oatlite.maths.balance import load_balancing_loss
from oatlite.maths.logprobs import token_logprobs, token_logprobs_and_entropies
from oatlite.shared_attention import install

LOGITS_CHUNK_TOKENS = 512


def load_policy(
    path: str, dtype: torch.dtype, *, trust_remote_code: bool = False, quantized_on: torch.device | None = None
) -> nn.Module:
    """A causal language model for training: no cache, no dropout (its log-probabilities must be the sampler's).

    With ``quantized_on`` a device, it lies there, and its linear layers but the output head have 4 bits a weight
    (double-quantized NF4, as QLoRA has them, arXiv 2305.14314), to be trained with an adapter.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantized_on is not None:
        options |= {"quantization_config": _nf4(dtype), "device_map": {"": quantized_on}}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the model {path}: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def checkpoint_gradients(model: Any) -> None:
    """Keep only the inputs of each layer for the backward pass, which computes the rest again.

    Transformers does so in training mode alone; there is no dropout that this could switch on.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def save_policy(model: nn.Module, state: dict[str, torch.Tensor], tokenizer_path: str, folder: Path) -> None:
    """Write ``folder`` so that transformers and vLLM load it: weights as safetensors, configuration, tokenizer.

    ``state`` holds whole weights, also of a quantized model.
    """
    from transformers import AutoTokenizer

    if getattr(model, "is_quantized", False):
        model = _unquantized(model)
    model.config.use_cache = True  # type: ignore[union-attr]
    model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder)


def _unquantized(model: Any) -> nn.Module:
    """A model of the same shape without contents, which knows nothing of 4 bits."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        result: nn.Module = type(model)._from_config(config, dtype=config.dtype)
    return result


class PairModel(nn.Module):
    """Wraps a causal language model; its forward gives log-probabilities at response tokens only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.takes_prompt_masks = install(model)

    def forward(self, batch: ForwardBatch) -> Any:
        """Log-probabilities (N,) float32 of ``batch.targets``; with ``batch.wants_entropies`` (2, N): these, and the
        entropies in nats of the distributions that they come from, without gradient. With ``batch.is_token`` a tuple:
        what was said, and the load-balancing loss of the routers of a mixture of experts."""
        backbone = self.model.base_model
        mask = batch.attention_mask
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            mask = mask.to(next(self.model.parameters()).dtype)
        routed = {"output_router_logits": True} if batch.is_token is not None else {}
        output = backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False, **routed
        )
        logprobs = self._logprobs(output.last_hidden_state, batch)
        if batch.is_token is None:
            return logprobs
        top_k = self.model.config.get_text_config().num_experts_per_tok
        return logprobs, load_balancing_loss(output.router_logits, top_k, batch.is_token)

    def _logprobs(self, hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        predictors = hidden[batch.predictor_rows, batch.predictor_columns]
        bias = getattr(head, "bias", None)
        if batch.wants_entropies:
            both = token_logprobs_and_entropies(predictors, head.weight, bias, batch.targets, chunk=LOGITS_CHUNK_TOKENS)
            return torch.stack(both)
        return token_logprobs(predictors, head.weight, bias, batch.targets, chunk=LOGITS_CHUNK_TOKENS)

"""Policies and references: loading, the pair forward, and how a batch of pairs is laid out for it.

A pair is trained on as one sequence ``[prompt, chosen, rejected]``: both responses start at the position after the
prompt, and a mask hides ``chosen`` from ``rejected``, so the prompt is computed once. A model whose attention takes
no such mask gets two plain sequences; :func:`choose_layout` finds out by trying. Layouts:

- ``shared``: one sequence, with a mask for the positions after the prompt alone (:mod:`oatlite.shared_attention`);
- ``masked``: the same with a mask for all positions, where a model's attention cannot be replaced;
- ``plain``: two sequences.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from oatlite.errors import ConfigError
from oatlite.maths.balance import load_balancing_loss
from oatlite.maths.logprobs import token_logprobs, token_logprobs_and_entropies
from oatlite.shared_attention import install

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]
LayoutName = Literal["shared", "masked", "plain"]
LOGITS_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Prompt and both responses as token ids, in the order that the loss wants them."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_response_tokens

    @property
    def num_response_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One micro-batch, ready for the model: R rows of L tokens, N response tokens of B pairs.

    ``predictor_rows`` and ``predictor_columns`` (N,) say where the hidden state lies that predicts each response
    token, ``targets`` (N,) which token it is, and ``segments`` (N,) to which response it belongs: 2b for the chosen
    one of pair b, 2b + 1 for the rejected one. ``wants_entropies`` asks for the entropy at each of them too.
    ``is_token`` (R, L), False on padding, asks for the routers' balance over these.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predictor_rows: torch.Tensor
    predictor_columns: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor
    num_pairs: int
    wants_entropies: bool = False
    is_token: torch.Tensor | None = None


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
        if mask.is_floating_point():
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


def lay_out(
    pairs: Sequence[TokenPair],
    layout: LayoutName,
    pad_token_id: int,
    device: torch.device,
    *,
    wants_entropies: bool = False,
    wants_balance: bool = False,
) -> ForwardBatch:
    """Put pairs into rows: one per response (``plain``) or one per pair."""
    rows: list[list[Tokens]] = []
    for pair in pairs:
        if layout == "plain":
            rows += [[pair.prompt, pair.chosen], [pair.prompt, pair.rejected]]
        else:
            rows.append([pair.prompt, pair.chosen, pair.rejected])
    length = max(sum(len(part) for part in row) for row in rows)
    input_ids = np.full((len(rows), length), pad_token_id, np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    part_ids = np.full((len(rows), length), -1, np.int64)
    predictors: list[tuple[int, npt.NDArray[np.int64], Tokens]] = []
    for r, (prompt, *responses) in enumerate(rows):
        end = len(prompt)
        input_ids[r, :end], position_ids[r, :end], part_ids[r, :end] = prompt, np.arange(end), 0
        for s, response in enumerate(responses):
            span = slice(end, end + len(response))
            input_ids[r, span], part_ids[r, span] = response, 1 + s
            position_ids[r, span] = len(prompt) + np.arange(len(response))
            before = np.arange(end - 1, end - 1 + len(response))
            before[:1] = len(prompt) - 1
            predictors.append((r, before, response))
            end += len(response)
    lengths = [len(response) for _, _, response in predictors]
    return ForwardBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        attention_mask=_mask(torch.from_numpy(part_ids).to(device), layout, min(len(pair.prompt) for pair in pairs)),
        predictor_rows=torch.from_numpy(np.repeat([r for r, _, _ in predictors], lengths)).to(device),
        predictor_columns=torch.from_numpy(np.concatenate([before for _, before, _ in predictors])).to(device),
        targets=torch.from_numpy(np.concatenate([t for _, _, t in predictors]).astype(np.int64)).to(device),
        segments=torch.from_numpy(np.repeat(np.arange(len(predictors)), lengths)).to(device),
        num_pairs=len(pairs),
        wants_entropies=wants_entropies,
        is_token=torch.from_numpy(part_ids >= 0).to(device) if wants_balance else None,
    )


def _mask(part_ids: torch.Tensor, layout: LayoutName, shortest_prompt: int) -> torch.Tensor:
    """The attention mask for rows cut into parts (R, L): 0 the prompt, 1 and 2 responses, -1 padding.

    ``plain`` gives the usual (R, L) mask of ones and zeros, ``masked`` an additive (R, 1, L, L) one, and ``shared``
    what that has after the first ``shortest_prompt`` queries.
    """
    if layout == "plain":
        return (part_ids >= 0).long()
    first = shortest_prompt if layout == "shared" else 0
    position = torch.arange(part_ids.shape[1], device=part_ids.device)
    query, key = part_ids[:, first:, None], part_ids[:, None, :]
    visible = ((key == query) | (key == 0)) & (position <= position[first:, None])
    additive = torch.zeros(visible.shape, device=part_ids.device)
    # finfo.min and not -inf: a model in bfloat16 or a fused kernel turns rows of -inf into NaN.
    return additive.masked_fill_(~visible, torch.finfo(torch.bfloat16).min)[:, None]


def choose_layout(
    model: PairModel, vocab_size: int, pad_token_id: int, device: torch.device, *, longest: tuple[int, int]
) -> LayoutName:
    """The fastest layout by which the model computes the log-probabilities of ``plain``; that one is said in the log.

    ``longest`` is the length of the longest prompt and of the longest response, in tokens: a model whose attention
    reaches over a window alone may agree on short rows and not on these.
    Raises ConfigError for a model whose logits are not its output head times its last hidden state (scaled or capped
    logits), because the chunked log-probabilities would be wrong for it.
    """
    generator = np.random.default_rng(0)

    def random_pair(*sizes: int) -> TokenPair:
        prompt, chosen, rejected = (generator.integers(0, vocab_size, size).astype(np.int32) for size in sizes)
        return TokenPair(prompt=prompt, chosen=chosen, rejected=rejected)

    pairs = [random_pair(9, 4, 6), random_pair(5, 7, 3)]
    long_pair = [random_pair(longest[0], longest[1], longest[1])]
    with torch.no_grad():
        plain = lay_out(pairs, "plain", pad_token_id, device)
        expected = model(plain)
        logits = model.model(input_ids=plain.input_ids, attention_mask=plain.attention_mask, use_cache=False).logits
        direct = logits[plain.predictor_rows, plain.predictor_columns].float().log_softmax(-1)
        direct = direct.gather(1, plain.targets[:, None])[:, 0]
        is_exact = expected.dtype == next(model.parameters()).dtype
        atol, rtol = (1e-4, 1e-4) if is_exact else (0.15, 0.02)
        if not torch.allclose(direct, expected, atol=atol, rtol=rtol):
            raise ConfigError(
                f"the logits of {type(model.model).__name__} are not its output head times its last hidden state",
                "use a model without scaled or capped logits",
            )
        why = ""
        tried: tuple[LayoutName, ...] = ("shared", "masked") if model.takes_prompt_masks else ("masked",)
        for name in tried:
            try:
                found = model(lay_out(pairs, name, pad_token_id, device))
                if torch.allclose(found, expected, atol=atol, rtol=rtol):
                    apart, found = (model(lay_out(long_pair, each, pad_token_id, device)) for each in ("plain", name))
                    # Rounding in bfloat16 can move one of many tokens far; a window that is cut moves all of them.
                    if float((found - apart).abs().mean()) < atol / 3:
                        return name
                    why = f"log-probabilities differ by {float((found - apart).abs().max()):.2g}"
                else:
                    why = f"log-probabilities differ by {float((found - expected).abs().max()):.2g}"
            except (RuntimeError, ValueError, TypeError) as error:
                why = str(error).splitlines()[0]
    log.warning("%s takes no shared-prompt mask (%s); using plain sequences", type(model.model).__name__, why)
    return "plain"

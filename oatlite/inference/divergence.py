"""How far a model has moved from another, from the log-probabilities that both give to its own samples."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from oatlite.config.schema import Config
from oatlite.fitting import Report
from oatlite.inference.sampling import Responses, device_of
from oatlite.layout_choice import choose_layout
from oatlite.layouts import TokenPair, lay_out
from oatlite.maths.intervals import mean_and_error, ratio_and_error
from oatlite.models import PairModel, load_policy
from oatlite.quiet import quiet

if TYPE_CHECKING:
    from oatlite.data import PromptSet

BATCH_TOKENS = 4096
EMPTY = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """An estimate of KL(model || base) over responses, in nats, and its standard errors (NaN for one response)."""

    per_response: float
    per_response_error: float
    per_token: float
    per_token_error: float
    num_responses: int
    num_tokens: int


def divergence(
    config: Config, model: str, base: str, prompts: PromptSet, responses: Responses, pad: int, report: Report
) -> Divergence:
    """The mean over responses, sampled from ``model`` at temperature 1, of log pi(response) - log pi_base(response).

    EOS, where it was sampled, counts as a token. Both sums are computed here, one model after the other, and not taken
    from the sampler, whose rounding is another.
    """
    pairs = [
        TokenPair(prompt=tokens, chosen=np.asarray(response.tokens, np.int32), rejected=EMPTY)
        for tokens, some in zip(prompts.tokens, responses, strict=True)
        for response in some
    ]
    ours, theirs = (
        response_logprobs(config, path, pairs, pad, report, what)
        for path, what in ((model, "log-probabilities"), (base, "those of the base"))
    )
    difference, sizes = ours - theirs, [len(pair.chosen) for pair in pairs]
    per_response, per_token = mean_and_error(difference), ratio_and_error(difference, sizes)
    return Divergence(
        per_response=per_response[0],
        per_response_error=per_response[1],
        per_token=per_token[0],
        per_token_error=per_token[1],
        num_responses=len(pairs),
        num_tokens=sum(sizes),
    )


def response_logprobs(
    config: Config, path: str, pairs: Sequence[TokenPair], pad: int, report: Report, what: str
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The sum of log-probabilities (B,) of each ``chosen`` response under the model at ``path``; there is no
    ``rejected`` one. The model is gone when this returns."""
    device = torch.device(device_of(config))
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    with quiet():
        policy = load_policy(path, dtype, trust_remote_code=config.model.trust_remote_code)
    model = PairModel(policy.to(device).eval().requires_grad_(False))
    vocab_size = model.model.config.get_text_config().vocab_size
    longest = max(len(pair.prompt) for pair in pairs), max(len(pair.chosen) for pair in pairs)
    layout = choose_layout(model, vocab_size, pad, device, longest=(longest[0], max(1, longest[1] // 2)))
    sums = np.zeros(len(pairs), np.float64)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].num_tokens, reverse=True)
    done = 0
    with torch.inference_mode():
        while done < len(order):
            room = max(1, BATCH_TOKENS // pairs[order[done]].num_tokens)
            block = order[done : done + room]
            batch = lay_out([pairs[i] for i in block], layout, pad, device)
            logprobs = model(batch).double().cpu().numpy()
            totals = np.bincount(batch.segments.cpu().numpy(), weights=logprobs, minlength=2 * len(block))
            sums[block] = totals[::2]
            done += len(block)
            report(what, done, len(order), "")
    del model, policy
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sums

"""Forward and backward over pairs, plain and with a shared prompt, and log-probabilities in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pair_forward import plain_forward
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gpu_rows.roofline import WITH_BACKWARD, Work
from gpu_rows.scale import PAD, Scale, Tell
from gpu_rows.timing import mib, peak_bytes, seconds
from oatlite.layout_choice import choose_layout, rivals
from oatlite.layouts import LayoutName, TokenPair, lay_out
from oatlite.maths.logprobs import token_logprobs
from oatlite.models import LOGITS_CHUNK_TOKENS, PairModel


def pairs_of(scale: Scale, count: int, prompt_tokens: int) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    sizes = (prompt_tokens, scale.new_tokens, scale.new_tokens)
    parts = [[scale.tokens(rng, size) for size in sizes] for _ in range(count)]
    return [TokenPair(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in parts]


def pair_forward(scale: Scale, tell: Tell) -> None:
    model = PairModel(scale.network(AutoModelForCausalLM, scale.config()))
    prompts = (10, 40) if scale.tiny else (100, 400, 1000)
    layout = choose_layout(model, scale.vocab_size, PAD, scale.place(), longest=(prompts[-1], scale.new_tokens))
    attention = model.model.config._attn_implementation
    tell("layout", f"{layout}, attention {attention}, {scale.dtype_name}", layout=layout, attention=attention)
    others = rivals(scale.place(), takes_prompt_masks=model.takes_prompt_masks)[0]
    for prompt_tokens in prompts:
        _compare(scale, tell, model, [layout, *(name for name in others if name != layout)], prompt_tokens)


def _compare(scale: Scale, tell: Tell, model: PairModel, layouts: Sequence[LayoutName], prompt_tokens: int) -> None:
    """``plain`` with all logits at once, ``apart`` in chunks, and the layouts that share, the chosen one first."""
    count = scale.micro_batch_size
    pairs = pairs_of(scale, count, prompt_tokens)
    ways: dict[str, LayoutName] = {"plain": "plain", "apart": "plain"} | {str(name): name for name in layouts}
    chosen = layouts[0]

    def logprobs(way: str) -> torch.Tensor:
        batch = lay_out(pairs, ways[way], PAD, scale.place())
        return plain_forward(model, batch) if way == "plain" else model(batch)

    def step(way: str) -> Callable[[], None]:
        def work() -> None:
            logprobs(way).sum().backward()
            model.zero_grad(set_to_none=True)  # so that each begins without gradients, in memory too

        return work

    peaks = {way: peak_bytes(scale, step(way)) for way in ways}
    times = {way: seconds(scale, step(way)) for way in ways}
    with torch.no_grad():
        apart = (logprobs("plain") - logprobs(chosen)).abs()
    said = ", ".join(f"{way} {1e3 * times[way]:.1f} ms {mib(peaks[way])}" for way in ways)
    speedup = times["plain"] / times[chosen]
    rate = ""
    if scale.operations_per_s is not None:
        work = Work.of(scale, count, prompt_tokens)
        operations = work.operations(WITH_BACKWARD, is_shared=chosen != "plain", with_head=True)
        rate = f", {operations / times[chosen] / scale.operations_per_s:.0%} of the matrix product's rate"
    tell(
        f"{count} pairs, prompts of {prompt_tokens}",
        f"{said}; {speedup:.2f}x{rate}; differs by {float(apart.mean()):.1e}, at most {float(apart.max()):.1e}",
        is_met=None if scale.tiny else speedup >= 1.0,
        seconds=times,
        peak_bytes=peaks,
        mean_difference=float(apart.mean()),
        largest_difference=float(apart.max()),
    )


def log_probabilities(scale: Scale, tell: Tell) -> None:
    """Of a step's response tokens: the output head's part alone, forward and backward."""
    torch.manual_seed(0)
    width, vocab = scale.shape["hidden_size"], scale.vocab_size
    placed = {"device": scale.place(), "dtype": scale.dtype()}
    head = (torch.randn(vocab, width, **placed) / width**0.5).requires_grad_()
    for num_pairs in (scale.micro_batch_size, scale.num_prompts):
        num_tokens = 2 * scale.new_tokens * num_pairs
        hidden = torch.randn(num_tokens, width, **placed).requires_grad_()
        targets = torch.randint(vocab, (num_tokens,), device=scale.place())

        def whole(hidden: torch.Tensor = hidden, targets: torch.Tensor = targets) -> torch.Tensor:
            logits = F.linear(hidden, head).float()
            return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

        def chunked(
            chunk: int, hidden: torch.Tensor = hidden, targets: torch.Tensor = targets
        ) -> Callable[[], torch.Tensor]:
            return lambda: token_logprobs(hidden, head, None, targets, chunk=chunk)

        def backward(forward: Callable[[], torch.Tensor], hidden: torch.Tensor = hidden) -> Callable[[], None]:
            def work() -> None:
                forward().sum().backward()
                hidden.grad = head.grad = None

            return work

        ours = chunked(LOGITS_CHUNK_TOKENS)
        with torch.no_grad():
            exact = token_logprobs(hidden.double(), head.double(), None, targets, chunk=256)
            errors = [float((found().double() - exact).abs().max()) for found in (whole, ours)]
        del exact
        peaks = [peak_bytes(scale, backward(found)) for found in (whole, ours)]
        times = {"whole": seconds(scale, backward(whole))}
        for chunk in (LOGITS_CHUNK_TOKENS, 2048, 8192):
            times[f"chunks of {chunk}"] = seconds(scale, backward(chunked(chunk)))
        said = ", ".join(f"{way} {1e3 * value:.2f} ms" for way, value in times.items())
        tell(
            f"{num_tokens} tokens of {vocab}",
            f"{said}; {mib(peaks[0])} whole, {mib(peaks[1])} in ours; off by {errors[0]:.1e} and {errors[1]:.1e}",
            seconds=times,
            peak_bytes=peaks,
            largest_errors=errors,
        )

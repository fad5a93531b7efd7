"""Token-level mixtures inside vLLM: which requests ask for one, and the reference's share in their logits.

Both models are needed at each token. The reference stands beside the engine as a Hugging Face model with a cache of its
own (:mod:`oatlite.next_token`), and what it says is mixed in before vLLM's sampler sees the logits: so temperature,
top-p and seeds act on the mixture, and its log-probabilities are what is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from oatlite.next_token import NextTokens

MIXTURE = "oatlite-mixture"  # what tells a request's coefficients to its logits processor
REFERENCE_CACHE_BYTES = 4 << 30  # of the reference beside the engine; more requests at once than fit wait for others


def mixing_arguments() -> dict[str, Any]:
    """Of ``vllm.LLM``, for an engine that mixes. Scheduled ahead of time, a step would not know the tokens of the one
    before."""
    return {"logits_processors": [_tracker_class()], "async_scheduling": False}


def mix_in(runner: Any, reference: NextTokens) -> None:
    """Let vLLM's model ``runner`` sample the requests that ask for a mixture from policy and ``reference``."""
    import torch

    from oatlite.maths.samplers import mixed_logprobs

    (tracker,) = (one for one in runner.input_batch.logitsprocs.all if hasattr(one, "running"))

    def mix(module: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        running = dict(tracker.running)
        if not running:
            return None
        rows = list(running)
        logits = keywords["logits"].float()
        shares = torch.tensor([running[row].coefficients for row in rows], device=logits.device)
        logits[rows] = mixed_logprobs(logits[rows], reference.logits(list(running.values())), shares)
        return args, keywords | {"logits": logits}

    # Not as a logits processor's own work, which vLLM does after it has taken the log-probabilities to report.
    runner.sampler.register_forward_pre_hook(mix, with_kwargs=True)


def waves(indices: Sequence[int], is_mixed: Sequence[bool], num_bytes: int) -> Iterator[Sequence[int]]:
    """Cut requests, each of up to ``num_bytes`` in the reference's cache, so that the mixtures of a wave fit there."""
    at_once = max(1, REFERENCE_CACHE_BYTES // max(1, num_bytes))
    wave: list[int] = []
    num_mixed = 0
    for index, mixed in zip(indices, is_mixed, strict=True):
        if mixed and num_mixed == at_once:
            yield wave
            wave, num_mixed = [], 0
        wave.append(index)
        num_mixed += mixed
    if wave:
        yield wave


def _tracker_class() -> type[Any]:
    """A logits processor that changes nothing, and knows which row of the batch is a mixture's request."""
    from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

    from oatlite.next_token import Running

    def begin(params: Any, prompt: list[int] | None, response: list[int]) -> Running | None:
        shares = (params.extra_args or {}).get(MIXTURE)
        return None if shares is None else Running(prompt or (), response, shares)

    class Tracker(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self.running: dict[int, Running] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self.running, batch_update, begin)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    return Tracker

"""What is asked of vLLM for one response, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oatlite.engine.mixing import MIXTURE
from oatlite.sampling import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response: token ids, the log-probability of each (T,) under its sampler's distribution at temperature 1, and
    its text without EOS."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    text: str
    is_finished: bool


def sampling_params(
    seed: int,
    sampling: SamplingOptions,
    *,
    output_kind: str = "CUMULATIVE",
    mixture: tuple[float, float] | None = None,
) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        seed=None if sampling.is_greedy else int(seed) % 2**63,
        logprobs=0,
        flat_logprobs=True,
        extra_args=None if mixture is None else {MIXTURE: mixture},
        output_kind=RequestOutputKind[output_kind],
    )


def sample_of(output: Any) -> Sample:
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = output.logprobs
    assert logprobs is not None and len(logprobs) == len(tokens)
    values = np.fromiter(
        (logprobs.logprobs[logprobs.start_indices[i]] for i in range(len(tokens))), np.float32, len(tokens)
    )
    return Sample(tokens=tokens, logprobs=values, text=output.text, is_finished=output.finish_reason == "stop")

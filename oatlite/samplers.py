"""Where responses come from, by name: the policy, the reference, or a token-level mixture of both.

The mixtures are those of "The Crucial Role of Samplers in Online DPO" (arXiv 2409.19605), DPO-Mix-P. At each token
the logits of ``mixture-plus`` are ``(1 + w) log pi - w log pi_ref``, and those of ``mixture-minus``
``(1 - w) log pi + w log pi_ref``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from oatlite.config.flags import to_type
from oatlite.errors import ConfigError

if TYPE_CHECKING:
    from oatlite.algorithms.base import Algorithm

SAMPLERS = ("policy", "reference", "mixture-plus", "mixture-minus")
MIXTURES = frozenset({"mixture-plus", "mixture-minus"})

PLANS: dict[str, tuple[str, str]] = {
    "policy": ("policy", "policy"),
    "reference": ("reference", "reference"),
    "hybrid": ("policy", "reference"),
    "mixture": ("mixture-plus", "mixture-minus"),
}
"""By the name that ``--sampler`` takes: the samplers of a prompt's two candidates."""


def coefficients(sampler: str, mixture_weight: float) -> tuple[float, float]:
    """What ``log pi`` and ``log pi_ref`` count in a sampler's logits."""
    return {
        "policy": (1.0, 0.0),
        "reference": (0.0, 1.0),
        "mixture-plus": (1.0 + mixture_weight, -mixture_weight),
        "mixture-minus": (1.0 - mixture_weight, mixture_weight),
    }[sampler]


def sampling_plan(algorithm: Algorithm, name: str) -> Sequence[str]:
    """The sampler of each candidate of a prompt: the algorithm's own plan, or the one that ``--sampler name`` asks for.

    Raises ConfigError where both say something, and for a sampler that there is none of.
    """
    from oatlite.algorithms.base import Algorithm

    kind = type(algorithm)
    if name != "policy" and kind.sampling_plan is not Algorithm.sampling_plan:
        raise ConfigError(
            f"{to_type('rollout.sampler', name)}, and {kind.__name__} says itself where its responses come from",
            "leave it out",
        )
    plan = tuple(algorithm.sampling_plan()) if name == "policy" else PLANS[name]
    unknown = [sampler for sampler in plan if sampler not in SAMPLERS]
    if unknown:
        raise ConfigError(
            f"{kind.__name__}.sampling_plan names the sampler {unknown[0]!r}", f"name some of {', '.join(SAMPLERS)}"
        )
    return plan

"""How a response is drawn, wherever it is drawn and from whichever distribution (:mod:`oatlite.samplers`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oatlite.config.schema import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """``temperature`` 0 is greedy, ``top_p`` 1 and ``top_k`` 0 are off; a response has at most ``max_new_tokens``,
    its EOS among them."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int

    @classmethod
    def of(cls, config: SamplingConfig, *, is_greedy: bool = False) -> SamplingOptions:
        """Those of a configuration; greedy responses have their length from it alone."""
        if is_greedy:
            return cls(temperature=0.0, max_new_tokens=config.max_new_tokens)
        return cls(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

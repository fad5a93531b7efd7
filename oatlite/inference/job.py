"""What a sampling process is told and what it tells, as JSON in a private folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from oatlite.config.schema import Config
from oatlite.sampling import SamplingOptions

REPLIES, FAILURE, LOG = "replies.jsonl", "failure.json", "log"


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(_Told):
    """How to sample ``num_samples`` responses to each prompt. Draws with other ``purpose`` are other draws."""

    options: SamplingOptions
    num_samples: int = 1
    purpose: int = 0


class Job(_Told):
    """One engine, and what it samples: ``prompts`` are token ids, ``rows`` the numbers that their seeds come from.

    ``model`` is a folder or a hub id, and ``adapter`` a folder with a LoRA adapter for it.
    """

    config: Config
    model: str
    adapter: Path | None = None
    device: Literal["cpu", "cuda"]
    threads: int
    prompts: list[list[int]]
    rows: list[int]
    samplings: list[Sampling]

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * sum(sampling.num_samples for sampling in self.samplings)

    @property
    def max_model_len(self) -> int:
        return max(map(len, self.prompts)) + max(sampling.options.max_new_tokens for sampling in self.samplings)


class Response(_Told):
    """One sample of one prompt: the text without EOS, the tokens with it, and the sum of their log-probabilities at
    temperature 1, before top-p and top-k."""

    sampling: int
    prompt: int
    sample: int
    text: str
    tokens: list[int]
    logprob: float
    is_finished: bool


class Failure(_Told):
    exit_code: int
    message: str
    fix: str

"""``oatlite generate``: responses to the prompts of a dataset, as a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oatlite.config.schema import Config
from oatlite.data import PromptSet, is_conversation
from oatlite.errors import ConfigError
from oatlite.fitting import Report
from oatlite.inference.inputs import check_model, read_prompts
from oatlite.inference.job import Sampling
from oatlite.inference.sampling import Responses, job_for, sample
from oatlite.lora import read_adapter
from oatlite.output_file import json_lines, require_writable, write_complete
from oatlite.sampling import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """``config`` is resolved for inference. ``needs_references``: prompts without an answer are an error."""

    config: Config
    output: Path
    adapter: Path | None = None
    num_samples: int = 1
    is_greedy: bool = False
    overwrite: bool = False
    needs_references: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """``share_truncated`` is the share of responses that ended by their length."""

    num_prompts: int
    num_dropped: int
    num_responses: int
    mean_tokens: float
    share_truncated: float


def generate(options: GenerateOptions, report: Report) -> Generated:
    """Sample, and write ``options.output`` when all is there. Raises OatliteError."""
    config = options.config
    require_writable(options.output, (".jsonl",), overwrite=options.overwrite)
    if options.is_greedy and options.num_samples > 1:
        raise ConfigError(
            f"--num-samples {options.num_samples}: greedy responses are all the same", "leave --greedy or it out"
        )
    if options.adapter is not None:
        read_adapter(options.adapter)
    assert config.model.path is not None
    model, tokenizer = check_model(config, config.model.path, "the model")
    prompts = read_prompts(config, model, tokenizer, needs_references=options.needs_references)
    sampling = Sampling(
        options=SamplingOptions.of(config.sampling, is_greedy=options.is_greedy), num_samples=options.num_samples
    )
    job = job_for(config, config.model.path, prompts, [sampling], adapter=options.adapter)
    [responses] = sample(job, "generate", report)
    write_complete(options.output, json_lines(rows(prompts, responses)), overwrite=options.overwrite)
    flat = [response for some in responses for response in some]
    return Generated(
        num_prompts=len(prompts),
        num_dropped=prompts.num_dropped,
        num_responses=len(flat),
        mean_tokens=sum(len(response.tokens) for response in flat) / len(flat),
        share_truncated=sum(not response.is_finished for response in flat) / len(flat),
    )


def rows(prompts: PromptSet, responses: Responses) -> Iterator[dict[str, Any]]:
    """A row per sample, those of a prompt one after the other; ``row`` is the prompt's number in its split."""
    texts = as_given(prompts.raw_texts)
    for i, some in enumerate(responses):
        reference = {} if prompts.references is None else {"reference": prompts.references[i]}
        for response in some:
            yield {
                "row": int(prompts.rows[i]),
                "sample": response.sample,
                "prompt": texts[i],
                "response": response.text,
                **reference,
                "is_finished": response.is_finished,
                "num_tokens": len(response.tokens),
                "logprob": response.logprob,
            }


def as_given(raw_texts: list[str]) -> list[Any]:
    """Prompts as a dataset holds them: where one is a conversation of several messages, all are lists of messages,
    because a column has one type."""
    parsed = [_messages(text) for text in raw_texts]
    if all(messages is None for messages in parsed):
        return [*raw_texts]
    return [
        [{"role": "user", "content": text}] if messages is None else messages
        for text, messages in zip(raw_texts, parsed, strict=True)
    ]


def _messages(text: str) -> list[dict[str, str]] | None:
    if not text.startswith('[{"role"'):
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if is_conversation(value) else None

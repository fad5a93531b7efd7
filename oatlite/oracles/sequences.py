"""Token sequences of many lengths: made of two texts, cut into batches, and padded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A sequence, and of an encoder that tells prompt from response the segment of each of its tokens."""

    ids: list[int]
    segments: list[int] | None = None


def text_pairs(tokenizer: Any, model: Any, prompts: Sequence[str], responses: Sequence[str]) -> list[Tokens]:
    """Prompts and responses as encoders are trained on two texts: ``tokenizer(prompt, response)``, which puts between
    them what the model expects there. Segments only for a ``model`` that has more than one."""
    if not prompts:
        return []
    found = tokenizer(list(prompts), list(responses), verbose=False)
    has_segments = (
        "token_type_ids" in found
        and "token_type_ids" in inspect.signature(model.forward).parameters
        and getattr(model.config, "type_vocab_size", 2) > 1
    )
    segments = found["token_type_ids"] if has_segments else [None] * len(prompts)
    return [Tokens(ids, of_ids) for ids, of_ids in zip(found["input_ids"], segments, strict=True)]


def batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut ``order``, longest first, so that rows times the first row's length stays within ``batch_tokens``.

    A sequence that is longer than that is a batch of its own.
    """
    cut: list[list[int]] = []
    for i in order:
        longest = lengths[cut[-1][0]] if cut else 0
        if cut and (len(cut[-1]) + 1) * longest <= batch_tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


def longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, T) and their mask of ones and zeros (B, T); what stands in padding means nothing."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


def model_inputs(sequences: Sequence[Tokens], device: torch.device) -> dict[str, Tensor]:
    """What a model's forward takes, each right-padded (B, T); with segments where the sequences have them."""
    input_ids, mask = pad([tokens.ids for tokens in sequences])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    segments = [tokens.segments for tokens in sequences if tokens.segments is not None]
    if segments:
        inputs["token_type_ids"], _ = pad(segments)
    return {name: tensor.to(device) for name, tensor in inputs.items()}

"""Commands that generate, as processes, and what Hugging Face makes of the same models."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
from runs import DEADLINE_S, ENVIRONMENT, OATLITE, TEMPORARY
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 12
CPU = ("--gpus", "0")


def oatlite(*arguments: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(OATLITE), *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=ENVIRONMENT,
    )


def done(*arguments: str | Path) -> str:
    """The standard output of a command that must succeed, and leave nothing."""
    finished = oatlite(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr and "WARNING" not in finished.stderr
    assert list(TEMPORARY.glob("oatlite-*")) == []
    return finished.stdout


def greedy(model: Any, tokenizer: Any, prompt: str) -> tuple[str, float]:
    """What Hugging Face generates, and the sum of its log-probabilities."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), logprob(model, ids[0].tolist(), tokens.tolist())


@torch.no_grad()
def logprob(model: Any, prompt: list[int], response: list[int]) -> float:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[torch.arange(len(response)), response].sum())


def whole(text: str) -> str:
    """Without a character whose last bytes were cut off, which vLLM leaves out."""
    return text.rstrip("\ufffd")


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

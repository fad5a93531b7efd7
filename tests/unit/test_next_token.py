"""A model that follows requests which join, grow, leave and change places, against each text computed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_folders import VOCAB_SIZE, save_model

from oatlite.errors import ConfigError
from oatlite.models import load_policy
from oatlite.next_token import NextTokens, Running

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "neox", "moe"])
def test_requests_that_come_and_go_have_the_logits_of_their_own_texts(family: str, tmp_path: Path) -> None:
    model = load_policy(save_model(tmp_path / "model", family, seed=3), torch.float32)
    computed = 0

    def count(module: Any, args: Any, keywords: dict[str, Any]) -> None:
        nonlocal computed
        computed += keywords["input_ids"].numel()

    follows = NextTokens(model, CPU)
    rng = np.random.default_rng(0)
    running: list[Running] = []
    num_steps, num_tokens = 30, 0
    for step in range(num_steps):
        running = [row for row in running if rng.random() > 0.15]
        for _ in range(rng.integers(0, 3) if step else 3):
            prompt = rng.integers(3, VOCAB_SIZE, rng.integers(1, 20)).tolist()
            running += [Running(prompt, [], (0.0, 1.0)) for _ in range(rng.integers(1, 3))]
        rng.shuffle(running)  # type: ignore[arg-type]
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        found = follows.logits(running) if running else torch.zeros(0, VOCAB_SIZE)
        handle.remove()
        num_tokens += sum(len(row.prompt) + len(row.response) for row in running)
        for row, logits in zip(running, found, strict=True):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([[*row.prompt, *row.response]])).logits[0, -1]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
            row.response.append(int(rng.integers(3, VOCAB_SIZE)))  # type: ignore[attr-defined]
    assert computed < num_tokens / 3, "most tokens come from the cache"


def test_a_request_that_was_set_aside_is_computed_anew(tmp_path: Path) -> None:
    model = load_policy(save_model(tmp_path / "model", seed=3), torch.float32)
    follows = NextTokens(model, CPU)
    one, other = Running([5, 6, 7], [], (0.0, 1.0)), Running([8], [], (0.0, 1.0))
    follows.logits([one, other])
    one.response, other.response = [9, 10, 11], [12]
    found = follows.logits([other, one])
    follows.forget()
    torch.testing.assert_close(follows.logits([one, other]), found.flip(0), rtol=1e-4, atol=1e-4)


def test_the_size_of_its_cache_is_known(tmp_path: Path) -> None:
    model = load_policy(save_model(tmp_path / "model", "llama"), torch.float32)
    layers, hidden, float_bytes = 2, 16, 4
    assert NextTokens(model, CPU).cache_bytes_per_token == 2 * layers * hidden * float_bytes


def test_a_model_whose_cache_is_not_what_it_seems_is_refused(tmp_path: Path) -> None:
    model = load_policy(save_model(tmp_path / "model"), torch.float32)
    forward = type(model).forward

    class Forgetful(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **keywords: Any) -> Any:
            if keywords.get("past_key_values") is not None:
                keywords["position_ids"] = torch.zeros_like(keywords["position_ids"])
            return forward(self, *args, **keywords)

    model.__class__ = Forgetful
    with pytest.raises(ConfigError, match="cannot be continued for mixtures \\(Forgetful\\)"):
        NextTokens(model, CPU)


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    model = load_policy(save_model(tmp_path / "model"), torch.float32)

    class Recurrent(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **keywords: Any) -> Any:
            raise TypeError("past_key_values: no such thing here\nand more")

    model.__class__ = Recurrent
    with pytest.raises(ConfigError, match="no such thing here\\)"):
        NextTokens(model, CPU)

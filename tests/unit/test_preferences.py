"""Pairs for offline training: from rows of several shapes to token ids, and the rows that are refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_folders import byte_tokenizer

from oatlite.config.schema import DataConfig
from oatlite.errors import ConfigError
from oatlite.preferences import PreferenceSet, load_preferences

EOS = 0
ENDING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
AWAITING = "{% if add_generation_prompt %}<assistant>{% endif %}"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def load(
    folder: Path, rows: list[dict[str, Any]], *, held_out: int = 0, template: str | None = None, **options: Any
) -> tuple[PreferenceSet, PreferenceSet]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    data = DataConfig(preferences=str(path), chat_template=template is not None, **options)
    return load_preferences(data, held_out, tokenizer)


def text(tokens: np.ndarray[Any, Any]) -> str:
    return byte_tokenizer().decode(tokens)


def refused(folder: Path, rows: list[dict[str, Any]], *words: str, **options: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, rows, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def row(prompt: str = "Why?", chosen: str = "Because.", rejected: str = "So.") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_answers_follow_their_prompt_as_a_policy_would_write_them(tmp_path: Path) -> None:
    pairs, _ = load(tmp_path, [row(), row("Go on: ", " a", "b")])
    tokens = zip(pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens, strict=True)
    found = {text(prompt): (text(chosen), text(rejected)) for prompt, chosen, rejected in tokens}
    assert found == {"Why?": (" Because.<eos>", " So.<eos>"), "Go on: ": (" a<eos>", "b<eos>")}
    assert sorted(pairs.chosen) == [" a", "Because."]
    assert all(tokens.dtype == np.int32 for tokens in pairs.chosen_tokens)


def test_a_template_of_ones_own_goes_around_the_prompt(tmp_path: Path) -> None:
    pairs, _ = load(tmp_path, [row()], prompt_template="Q: {prompt} A:")
    assert text(pairs.prompt_tokens[0]) == "Q: Why? A:"
    assert (text(pairs.chosen_tokens[0]), pairs.prompts) == (" Because.<eos>", ["Why?"])


def test_rows_that_cannot_be_trained_on_are_counted(tmp_path: Path) -> None:
    unusable = [
        row(chosen=""),
        row(chosen="So."),
        row("x" * 50),
        row(rejected="y" * 40),
        {"prompt": "p", "chosen": "a"},
    ]
    unusable.append({"prompt": None, "chosen": "a", "rejected": "b"})
    pairs, _ = load(tmp_path, [row(), *unusable], max_prompt_tokens=20, max_response_tokens=30)
    assert (len(pairs), pairs.num_dropped) == (1, 6)
    assert (pairs.longest_prompt, pairs.longest_response) == (4, 10)


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [row(f"prompt {i % 10}", f"good {i}", f"bad {i}") for i in range(40)]
    training, held_out = load(tmp_path, rows, held_out=5)
    again = load(tmp_path, rows, held_out=5)
    assert len(held_out) == 5 and not set(held_out.prompts) & set(training.prompts)
    assert len(training) == 4 * (10 - len(set(held_out.prompts)))
    assert (again[0].chosen, again[1].chosen) == (training.chosen, held_out.chosen)
    assert len(load(tmp_path, rows, held_out=5, max_prompts=7)[0]) == 7


@pytest.mark.parametrize(
    "shape",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "So."},
        {"prompt": [said("user", "Why?")], "chosen": "Because.", "rejected": "So."},
        {"prompt": "Why?", "chosen": [said("assistant", "Because.")], "rejected": [said("assistant", "So.")]},
        {
            "prompt": [said("user", "Why?")],
            "chosen": [said("assistant", "Because.")],
            "rejected": [said("assistant", "So.")],
        },
        {
            "chosen": [said("user", "Why?"), said("assistant", "Because.")],
            "rejected": [said("user", "Why?"), said("assistant", "So.")],
        },
        {
            "prompt": "Why?",
            "chosen": [said("user", "Why?"), said("assistant", "Because.")],
            "rejected": [said("user", "Why?"), said("assistant", "So.")],
        },
    ],
    ids=["texts", "prompt messages", "answer messages", "messages", "whole", "whole and prompt"],
)
def test_every_shape_of_a_conversation_comes_to_the_same(tmp_path: Path, shape: dict[str, Any]) -> None:
    pairs, _ = load(tmp_path, [shape], template=ENDING + AWAITING)
    assert [text(tokens[0]) for tokens in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens)] == [
        "<user>Why?<eos>\n<assistant>",
        "Because.<eos>",
        "So.<eos>",
    ], "up to EOS, not the line end that the template writes after it"
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["Why?"], ["Because."], ["So."])


def test_a_template_without_an_end_gets_one(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}" + AWAITING
    pairs, _ = load(tmp_path, [row()], template=template)
    assert text(pairs.chosen_tokens[0]) == "Because.<eos>"


def test_several_turns_before_the_answer(tmp_path: Path) -> None:
    before = [said("user", "Hi"), said("assistant", "Hello"), said("user", "Why?")]
    whole = {"chosen": [*before, said("assistant", "Because.")], "rejected": [*before, said("assistant", "So.")]}
    pairs, _ = load(tmp_path, [whole], template=ENDING + AWAITING)
    assert text(pairs.prompt_tokens[0]).count("<eos>") == 3 and text(pairs.rejected_tokens[0]) == "So.<eos>"


def test_margins_come_from_their_column(tmp_path: Path) -> None:
    pairs, _ = load(tmp_path, [row() | {"by": 1.5}], margin_key="by")
    assert pairs.margins is not None and pairs.margins.tolist() == [1.5]
    refused(tmp_path, [row() | {"by": "much"}], "row 0", "'much'", "data.margin_key", margin_key="by")
    refused(tmp_path, [row()], "no column by", margin_key="by")


def test_what_is_refused(tmp_path: Path) -> None:
    whole = [said("user", "Why?"), said("assistant", "Because.")]
    other = [said("user", "How?"), said("assistant", "So.")]
    refused(tmp_path, [{"prompt": "p", "better": "a", "rejected": "b"}], "--set data.chosen_key=COLUMN", "better")
    refused(tmp_path, [{"chosen": "a", "rejected": "b"}], "without a prompt", "--prompt-key")
    refused(tmp_path, [{"chosen": whole, "rejected": other}], "differ in more", template=ENDING + AWAITING)
    refused(tmp_path, [{"chosen": whole[:1], "rejected": other[:1]}], "differ in more", template=ENDING + AWAITING)
    refused(tmp_path, [{"chosen": whole, "rejected": [whole[0], said("assistant", "So.")]}], "--chat-template")
    refused(tmp_path, [{"prompt": "p", "chosen": 1, "rejected": 2}], "int", "both be text")
    refused(tmp_path, [row(chosen="So.")], "no usable pair to train on", "1 are empty, equal")
    refused(tmp_path, [row()], "no usable pair to train on besides the 1 held out", "--eval-prompts", held_out=1)
    thinking = ENDING + "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    refused(tmp_path, [row()], "otherwise than one that awaits", template=thinking)

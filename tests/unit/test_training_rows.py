"""Rows of a source as tokens and labels: where the loss is, what is held out, and which layout a reward model reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_folders import byte_tokenizer, save_model

from oatlite.continuations import encode
from oatlite.data import raw_text
from oatlite.errors import ConfigError
from oatlite.finetuning.chats import encode_chat
from oatlite.finetuning.options import place, split_batch
from oatlite.finetuning.order import training_order
from oatlite.finetuning.pairs import PairKeys, pair_rows
from oatlite.finetuning.rows import Columns, choose_columns, policy_rows
from oatlite.oracles.reward_model import RewardModelOracle

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}|"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DISAGREES = PLAIN.replace("{{ m.content }}", "{% if loop.last %}<think>{% endif %}{{ m.content }}")
CHAT = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes é"},
]
PAIR_KEYS = PairKeys(prompt="prompt", chosen="chosen", rejected="rejected", reference="reference")


def tokenizer_with(template: str | None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, columns: Columns, tokenizer, *, max_tokens=64, eval_split=None, trains_on_prompts=False, seed=0):
    return policy_rows(
        source,
        "train",
        eval_split,
        columns,
        tokenizer,
        max_tokens=max_tokens,
        trains_on_prompts=trains_on_prompts,
        seed=seed,
    )


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_loss_is_on_what_the_assistant_says_and_its_ends(template: str) -> None:
    tokenizer = tokenizer_with(template)
    row = encode_chat(tokenizer, CHAT, "here")
    assert row is not None
    assert tokenizer.decode(row["input_ids"]) == (
        "<system>Count.|<user>2+2?|<assistant>four<eos>|<user>sure?|<assistant>yes é<eos>"
    )
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "four<eos>yes é<eos>"
    assert all(label in (token, -100) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_last_turn_without_eos_gets_one() -> None:
    tokenizer = tokenizer_with(PLAIN.replace("{{ eos_token }}", ""))
    row = encode_chat(tokenizer, CHAT[1:3], "here")
    assert row is not None
    assert tokenizer.decode(row["input_ids"]) == "<user>2+2?|<assistant>four|<eos>"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "four|<eos>"


def test_what_follows_the_last_answer_is_not_read() -> None:
    tokenizer = tokenizer_with(PLAIN)
    assert encode_chat(tokenizer, [*CHAT[:3], CHAT[3]], "here") == encode_chat(tokenizer, CHAT[:3], "here")
    assert encode_chat(tokenizer, CHAT[:2], "here") is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (DISAGREES, "row 3: the chat template writes message 2 otherwise"),
        (None, "no chat template"),
        ("{{ raise_exception('no system here') }}", "no system here"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_one_line(template: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        encode_chat(tokenizer_with(template), CHAT, "row 3")
    assert "\n" not in str(caught.value)


def test_columns_are_found_by_what_there_is() -> None:
    asked = {"prompt_key": "prompt", "reference_key": "reference", "messages_key": None, "text_key": None}
    assert choose_columns(["messages"], **asked).kind == "messages"
    assert choose_columns(["messages", "prompt"], **asked).keys == ("prompt", "reference")
    assert choose_columns(["messages", "t"], **{**asked, "text_key": "t"}) == Columns(kind="text", keys=("t",))
    assert choose_columns(["talk", "prompt"], **{**asked, "messages_key": "talk"}).keys == ("talk",)
    with pytest.raises(ConfigError, match="two kinds"):
        choose_columns(["messages"], **{**asked, "text_key": "t", "messages_key": "m"})


def test_references_are_tokenized_as_a_policy_produces_them(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {i}", "reference": f"it is {i}"} for i in range(40)]
    source = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "x", "reference": ""}, {"prompt": "y" * 80, **rows[0]}])
    tokenizer = byte_tokenizer(bos=True)
    columns = Columns(kind="references", keys=("prompt", "reference"))
    apart = read(source, columns, tokenizer, max_tokens=30)
    assert (apart.num_empty, apart.num_long, len(apart.held_out)) == (1, 0, 2)
    whole = [*apart.training, *apart.held_out]
    expected = {tuple(before + after): before for before, after in (encode(tokenizer, *r.values()) for r in rows)}
    for row in whole:
        before = expected[tuple(row["input_ids"])]
        assert row["labels"] == [-100] * len(before) + row["input_ids"][len(before) :]
    with_prompts = read(source, columns, tokenizer, max_tokens=30, trains_on_prompts=True)
    assert all(row["labels"] == row["input_ids"] for row in with_prompts.training)
    assert list(with_prompts.held_out) == list(apart.held_out)
    assert list(read(source, columns, tokenizer, max_tokens=30, seed=1).held_out) != list(apart.held_out)


def test_long_rows_are_left_out_and_long_texts_cut(tmp_path: Path) -> None:
    texts = ["a" * 25, "b" * 9, "c" * 3]
    source = write(tmp_path / "rows.jsonl", [{"text": text, "prompt": "p", "reference": text} for text in texts])
    tokenizer = byte_tokenizer()
    apart = read(source, Columns(kind="text", keys=("text",)), tokenizer, max_tokens=10)
    pieces = {tokenizer.decode(row["input_ids"]) for row in [*apart.training, *apart.held_out]}
    assert pieces == {"a" * 10, "a" * 5 + "<eos>", "b" * 9 + "<eos>", "ccc<eos>"}
    assert all(row["labels"] == row["input_ids"] for row in apart.training)
    references = read(source, Columns(kind="references", keys=("prompt", "reference")), tokenizer, max_tokens=12)
    assert (references.num_long, len(references.training), len(references.held_out)) == (1, 1, 1)
    with pytest.raises(ConfigError, match="raise --max-tokens"):
        read(source, Columns(kind="references", keys=("prompt", "reference")), tokenizer, max_tokens=4)


def test_an_eval_split_is_held_out_whole_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"train {i}"} for i in range(5)])
    write(tmp_path / "test.jsonl", [{"text": f"test {i}"} for i in range(3)])
    tokenizer = byte_tokenizer()
    columns = Columns(kind="text", keys=("text",))
    apart = read(str(tmp_path), columns, tokenizer, eval_split="test")
    assert [tokenizer.decode(row["input_ids"]) for row in apart.held_out] == [f"test {i}<eos>" for i in range(3)]
    assert len(apart.training) == 5
    with pytest.raises(ConfigError, match="no split dev"):
        read(str(tmp_path), columns, tokenizer, eval_split="dev")


@pytest.mark.parametrize(
    ("value", "words"), [("text", "no list of messages"), ([{"role": "user"}], "no list of messages")]
)
def test_what_is_no_conversation_is_named_by_its_row(tmp_path: Path, value: object, words: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"messages": value}])
    with pytest.raises(ConfigError, match=f"row 0 of split train of .*{words}"):
        read(source, Columns(kind="messages", keys=("messages",)), tokenizer_with(PLAIN))


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:3]}, {"messages": CHAT[:2]}, {"messages": []}]
    source = write(tmp_path / "rows.jsonl", rows)
    apart = read(source, Columns(kind="messages", keys=("messages",)), tokenizer_with(PLAIN), max_tokens=128)
    assert (apart.num_empty, len(apart.training) + len(apart.held_out)) == (2, 2)


# Pairs


def pairs_of(source: str, tokenizer, **more):
    apart = pair_rows(source, "train", None, PAIR_KEYS, tokenizer, **{"max_tokens": 128, "seed": 0, **more})
    return apart, [*apart.training, *apart.held_out]


def test_texts_are_laid_out_as_the_oracle_scores_them(tmp_path: Path) -> None:
    oracle = RewardModelOracle(save_model(tmp_path / "reward", reward=True))
    rows = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": " no"} for i in range(8)]
    apart, found = pairs_of(write(tmp_path / "rows.jsonl", rows), oracle.tokenizer)
    assert not apart.is_chat
    expected = {tuple(map(tuple, oracle.encode([row["prompt"]] * 2, [row["chosen"], row["rejected"]]))) for row in rows}
    assert {(tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in found} == expected


@pytest.mark.parametrize("kind", ["whole", "prompt apart", "prompt as text"])
def test_conversations_are_laid_out_as_the_oracle_scores_them(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat=True)
    oracle = RewardModelOracle(save_model(tmp_path / "reward", reward=True, tokenizer=tokenizer), chat_template=True)
    rows, expected = [], set()
    for i in range(8):
        start = [{"role": "user", "content": f"question {i}"}]
        if kind != "prompt as text":
            start = [{"role": "system", "content": "Be brief."}, *start]
        answers = [[{"role": "assistant", "content": f"{text} {i}"}] for text in ("yes", "no")]
        row = {"chosen": answers[0], "rejected": answers[1]}
        if kind == "whole":
            row = {name: [*start, *answer] for name, answer in row.items()}
        else:
            row["prompt"] = start[0]["content"] if kind == "prompt as text" else start
        rows.append(row)
        texts = [answer[0]["content"] for answer in answers]
        expected.add(tuple(map(tuple, oracle.encode([raw_text(start)] * 2, texts))))
    apart, found = pairs_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert apart.is_chat
    assert {(tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in found} == expected


def test_a_prompt_is_trained_on_or_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 4}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(40)]
    rows.append({"prompt": "p0", "chosen": "same", "rejected": "same"})
    tokenizer = byte_tokenizer()
    apart, found = pairs_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert (len(found), len(apart.held_out), apart.num_empty) == (40, 10, 1)
    prompts = [{tuple(row["chosen_ids"][:2]) for row in side} for side in (apart.training, apart.held_out)]
    assert (len(prompts[0]), len(prompts[1]), prompts[0] & prompts[1]) == (3, 1, set())


def test_answers_without_a_prompt_are_refused(tmp_path: Path) -> None:
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    source = write(tmp_path / "rows.jsonl", [{"chosen": answers[0], "rejected": answers[1]}])
    with pytest.raises(ConfigError, match="an answer without a prompt"):
        pairs_of(source, byte_tokenizer(chat=True))


# Batches and ranks


def test_each_epoch_has_each_row_once_and_steps_of_like_length() -> None:
    lengths = [1 + (i * 37) % 100 for i in range(100)]
    order = training_order(lengths, epochs=2, batch_size=8, seed=3)
    epochs = order[:100], order[100:]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == training_order(lengths, epochs=2, batch_size=8, seed=3)
    assert order != training_order(lengths, epochs=2, batch_size=8, seed=4)
    steps = [[lengths[row] for row in epochs[0][i : i + 8]] for i in range(0, 96, 8)]
    assert max(max(step) - min(step) for step in steps) <= 8
    assert [max(step) for step in steps] != sorted(max(step) for step in steps)


@pytest.mark.parametrize(
    ("batch_size", "micro", "ranks", "expected"), [(32, None, 1, 8), (12, None, 2, 6), (7, None, 1, 7), (8, 2, 2, 2)]
)
def test_a_step_divides_into_forward_passes(batch_size: int, micro: int | None, ranks: int, expected: int) -> None:
    assert split_batch(batch_size, micro, ranks) == expected


@pytest.mark.parametrize(
    ("batch_size", "micro", "ranks", "fix"), [(7, None, 2, "--batch-size 8"), (10, 4, 1, "--batch-size 12")]
)
def test_a_step_that_does_not_divide_says_which_does(batch_size: int, micro: int | None, ranks: int, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        split_batch(batch_size, micro, ranks)


def test_ranks_are_placed_on_gpus_or_the_cpu() -> None:
    assert place(None, None, 0) == (1, True)
    assert place(None, 2, 0) == (2, True)
    assert place(None, None, 4) == (4, False)
    assert place(2, 1, 4) == (1, False)
    assert place(0, None, 4) == (1, True)
    for asked in [(1, None, 0), (3, None, 2), (2, 3, 2)]:
        with pytest.raises(ConfigError):
            place(*asked)

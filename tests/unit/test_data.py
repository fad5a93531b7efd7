"""Prompts: where rows come from, what is kept, what is held out, and the words of every refusal."""

import json
import time

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from small_folders import byte_tokenizer

from oatlite import sources
from oatlite.config.schema import DataConfig
from oatlite.data import epoch_order, load_prompts, load_rows, load_tokenizer
from oatlite.errors import ConfigError

ROWS = [{"prompt": f"say {i:03d}", "reference": f" answer {i}"} for i in range(40)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def prompts_of(source, eval_prompts=0, tokenizer=None, *, max_prompt_tokens=64, **options):
    data = DataConfig(prompts=source, **options)
    return load_prompts(data, eval_prompts, tokenizer or byte_tokenizer(), max_prompt_tokens=max_prompt_tokens)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved_dict", "folder", "shards"])
def test_every_source_gives_the_same_rows_and_is_left_as_it_was(tmp_path, kind):
    dataset, home = Dataset.from_list(ROWS), tmp_path / "home"
    home.mkdir()
    source = home / f"rows.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(source)
        case "json":
            source.write_text(json.dumps(ROWS))
        case "csv":
            dataset.to_csv(source, index=False)
        case "parquet":
            dataset.to_parquet(source)
        case "saved":
            dataset.save_to_disk(source)
        case "saved_dict":
            DatasetDict(train=dataset, test=dataset.select(range(3))).save_to_disk(source)
        case "folder":
            source.mkdir()
            write_jsonl(source / "train.jsonl")
            write_jsonl(source / "test.jsonl", ROWS[:3])
        case "shards":
            (source / "data").mkdir(parents=True)
            dataset.select(range(30)).to_parquet(source / "data" / "train-00000-of-00002.parquet")
            dataset.select(range(30, 40)).to_parquet(source / "data" / "train-00001-of-00002.parquet")
    before = files_under(home)
    assert load_rows(str(source), "train").to_list() == ROWS
    training, _ = prompts_of(str(source), 4)
    assert len(training) == 36
    assert files_under(home) == before
    if kind in ("saved_dict", "folder"):
        assert len(load_rows(str(source), "test")) == 3


def test_csv_values_stay_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,reference\n"one, two", 007\n')
    assert load_rows(str(file), "train").to_list() == [{"prompt": "one, two", "reference": " 007"}]


def refused(call, *words):
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


def test_a_missing_file_is_said_at_once_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "hub_answers", lambda: pytest.fail("the hub was asked"))
    write_jsonl(tmp_path / "real.jsonl")
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_rows("./reel.jsonl", "train"), "./reel.jsonl does not exist", "real.jsonl")
    refused(lambda: load_rows("reel.jsonl", "train"), "reel.jsonl does not exist", "real.jsonl")
    refused(lambda: load_rows("nowhere/deep/er", "train"), "does not exist")
    refused(lambda: load_rows("~/no such folder", "train"), "~ is not expanded")
    refused(lambda: load_rows(str(tmp_path), "test"), "no split test", "it has real")


def test_a_missing_split_names_the_splits(tmp_path):
    rows = Dataset.from_list(ROWS)
    DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "saved")
    refused(lambda: load_rows(str(tmp_path / "saved"), "test"), "no split test", "train, validation")
    refused(lambda: load_rows(write_jsonl(tmp_path / "a.jsonl"), "test"), "no split test", "train")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', ["line 2 is not JSON"]),
        ("a.jsonl", '"prompt"\n', ["line 1 is a str"]),
        ("a.jsonl", '{"prompt": 1}\n{"prompt": "x"}\n', ["don't agree", "one type"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.json", "[1, 2]", ["no list of objects"]),
        ("a.csv", "prompt,reference\nx\n", ["row 1"]),
        ("a.csv", "prompt\nx,y\n", ["row 1"]),
        ("a.parquet", "nonsense", ["no valid parquet"]),
        ("a.txt", "x", [".jsonl"]),
        ("dataset/state.json", "{}", ["no complete saved dataset"]),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, text, words):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    refused(lambda: load_rows(str(file if file.parent == tmp_path else file.parent), "train"), *words)


def test_a_hub_that_does_not_answer_is_one_line_and_no_wait(tmp_path, monkeypatch):
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sources.hub_answers.cache_clear()
    started = time.monotonic()
    try:
        refused(lambda: load_rows("nobody/nothing", "train"), "nobody/nothing", "hub does not answer")
        refused(lambda: load_tokenizer("nobody/nothing"), "nobody/nothing")
    finally:
        sources.hub_answers.cache_clear()
    assert time.monotonic() - started < 20, "less than one file is asked for again and again"


def test_long_and_empty_prompts_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "x" * n, "reference": "r"} for n in (0, 1, 5, 6, 7, 50)]
    training, held_out = prompts_of(write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_tokens=6)
    assert sorted(training.texts) == ["x", "x" * 5, "x" * 6]
    assert training.num_dropped == 3
    assert len(held_out) == 0
    assert [len(tokens) for tokens in training.tokens] == [len(text) for text in training.texts]
    assert all(tokens.dtype == np.int32 for tokens in training.tokens)


def test_rows_point_back_to_the_source_and_references_keep_their_space(tmp_path):
    training, held_out = prompts_of(write_jsonl(tmp_path / "a.jsonl"), 7)
    assert len(held_out) == 7
    for prompts in (training, held_out):
        assert prompts.rows.dtype == np.int64
        assert prompts.texts == [ROWS[row]["prompt"] for row in prompts.rows]
        assert prompts.references == [ROWS[row]["reference"] for row in prompts.rows]
    assert sorted([*training.rows, *held_out.rows]) == list(range(40))


def test_what_is_held_out_is_fixed_and_never_trained_on(tmp_path):
    rows = [{"prompt": f"say {i % 10}", "reference": "r"} for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    training, held_out = prompts_of(source, 5)
    assert not set(training.texts) & set(held_out.texts)
    again, held_out_again = prompts_of(source, 5)
    assert again.texts == training.texts
    assert held_out_again.texts == held_out.texts
    assert len(training) + 6 * len(set(held_out.texts)) == 60
    mixed = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x" * (1 + i % 2 * 90) + str(i)} for i in range(40)])
    sets = prompts_of(mixed, 5, reference_key=None)
    assert sum(prompts.num_dropped for prompts in sets) == 20
    assert sum(map(len, sets)) == 20
    refused(lambda: prompts_of(source, 60), "no usable prompt to train on", "60 held out", "--eval-prompts")


def test_max_prompts_takes_the_first_of_the_same_order(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    every, _ = prompts_of(source, 5)
    some, _ = prompts_of(source, 5, max_prompts=11)
    assert some.texts == every.texts[:11]
    assert every.rows.tolist() != sorted(every.rows)


def test_an_order_longer_than_one_block_is_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("oatlite.data.READ_ROWS", 7)
    training, held_out = prompts_of(write_jsonl(tmp_path / "a.jsonl"), 10)
    assert sorted([*training.rows, *held_out.rows]) == list(range(40))


def test_an_eval_split_leaves_the_training_split_whole(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"test {i}", "reference": "r"} for i in range(9)])
    training, held_out = prompts_of(str(tmp_path), 4, eval_split="test")
    assert len(training) == 40
    assert len(held_out) == 4
    assert all(text.startswith("test") for text in held_out.texts)


def test_a_missing_column_names_the_columns(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    refused(lambda: prompts_of(source, prompt_key="query"), "no column query", "prompt, reference")
    refused(lambda: prompts_of(source, 3, reference_key="gold"), "no column gold", "prompt, reference")


def test_references_are_needed_only_where_they_are_compared_with(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    training, _ = prompts_of(source)
    assert training.references is None
    training, held_out = prompts_of(source, 1, reference_key=None)
    assert training.references is held_out.references is None
    holes = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "reference": None}, {"prompt": "b", "reference": None}])
    refused(lambda: prompts_of(holes, 1), "no text in reference")


def test_special_tokens_come_once_with_a_template_and_without(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    tokenizer = byte_tokenizer(bos=True, chat=True)
    plain, _ = prompts_of(source, 0, tokenizer)
    assert plain.texts == plain.raw_texts == ["hi"]
    assert plain.tokens[0].tolist() == tokenizer("hi")["input_ids"]
    assert plain.tokens[0].tolist().count(tokenizer.bos_token_id) == 1
    templated, _ = prompts_of(source, 0, tokenizer, chat_template=True)
    assert templated.texts == ["<bos><user>hi<assistant>"]
    assert templated.raw_texts == ["hi"]
    assert templated.tokens[0].tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(templated.tokens[0]) == templated.texts[0]


def test_conversations(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": turns}])
    chat = byte_tokenizer(chat=True)
    prompts, _ = prompts_of(source, 0, chat, chat_template=True)
    assert prompts.texts == ["<system>be brief<user>hi<assistant>"]
    assert json.loads(prompts.raw_texts[0]) == turns
    refused(lambda: prompts_of(source), "row 0", "--chat-template")
    refused(lambda: prompts_of(source, chat_template=True), "tokenizer has none")
    answered = write_jsonl(tmp_path / "b.jsonl", [{"prompt": [*turns, {"role": "assistant", "content": "yo"}]}])
    refused(lambda: prompts_of(answered, 0, chat, chat_template=True), "ends with the assistant")


def test_a_template_of_ones_own_goes_around_the_prompt_and_not_into_what_the_oracle_reads(tmp_path):
    turns = [{"role": "user", "content": "{hi}"}, {"role": "assistant", "content": "yo"}]
    rows = [{"prompt": turns}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts, _ = prompts_of(source, prompt_template="{x} Q: {prompt}\nA:")
    assert prompts.texts == ["{x} Q: {hi}\nA:"]
    assert prompts.raw_texts == ["{hi}"]
    assert byte_tokenizer().decode(prompts.tokens[0]) == prompts.texts[0]
    plain, _ = prompts_of(write_jsonl(tmp_path / "b.jsonl", ROWS[:1]), prompt_template="<{prompt}>")
    assert (plain.texts, plain.raw_texts) == (["<say 000>"], ["say 000"])


def test_epoch_orders_are_permutations_by_seed_and_epoch():
    orders = {(epoch, seed): epoch_order(50, epoch, seed) for epoch in (0, 1) for seed in (0, 1)}
    for order in orders.values():
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(50, 1, 0).tolist() == orders[1, 0].tolist()


def test_a_tokenizer_without_pad_gets_eos(tmp_path):
    byte_tokenizer(pad=False).save_pretrained(tmp_path / "a")
    assert load_tokenizer(str(tmp_path / "a")).pad_token == "<eos>"
    byte_tokenizer().save_pretrained(tmp_path / "b")
    assert load_tokenizer(str(tmp_path / "b")).pad_token == "<pad>"
    byte_tokenizer(pad=False, eos=False).save_pretrained(tmp_path / "c")
    refused(lambda: load_tokenizer(str(tmp_path / "c")), "neither a pad nor an EOS")
    (tmp_path / "d").mkdir()
    refused(lambda: load_tokenizer(str(tmp_path / "d")), "no tokenizer")

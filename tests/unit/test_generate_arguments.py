"""``oatlite generate``, ``chat`` and ``eval``: mistakes told before any process is started, and their pure parts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from oatlite_cli.main import main
from small_folders import byte_tokenizer, save_model

from oatlite.config.schema import Config, ModelConfig
from oatlite.data import PromptSet, load_all_prompts
from oatlite.errors import ConfigError
from oatlite.inference.evaluate import EvalOptions, _in_common, _Side, _summary, as_json
from oatlite.inference.generate import as_given, rows
from oatlite.inference.job import Response
from oatlite.lora import AdapterOptions, read_adapter, write_adapter
from oatlite.oracles.base import Verdicts


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "policy")
    save_model(folder / "wide", vocab_size=300)
    save_model(folder / "reward", reward=True)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "reference": "r" if i else None}) + "\n" for i in range(3))
    )
    (folder / "there.jsonl").write_text("")
    (folder / "empty").mkdir()
    return folder


GENERATE = ("generate", "--model", "policy", "--prompts", "prompts.jsonl", "--output", "out.jsonl", "--gpus", "0")
EVAL = ("eval", "--model", "policy", "--prompts", "prompts.jsonl", "--gpus", "0")
JUDGED = (*EVAL, "--oracle", "reward", "--max-new-tokens", "8")
CHAT = ("chat", "--model", "policy", "--gpus", "0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*GENERATE, "--output", "there.jsonl"), "--overwrite"),
        ((*GENERATE, "--output", "out.csv"), "name it out.jsonl"),
        ((*GENERATE, "--model", "gone/"), "gone/ does not exist"),
        ((*GENERATE, "--prompts", "gone.jsonl"), "gone.jsonl"),
        ((*GENERATE, "--prompt-key", "q"), "no column q; type --prompt-key COLUMN, one of: prompt"),
        ((*GENERATE, "--reference-key", "q"), "no column q"),
        ((*GENERATE, "--split", "test"), "no split test"),
        ((*GENERATE, "--chat-template"), "--no-chat-template"),
        ((*GENERATE, "--max-prompt-tokens", "1"), "no usable prompt"),
        ((*GENERATE, "--max-new-tokens", "127"), "128 positions"),
        ((*GENERATE, "--temperature", "0"), "greater than 0"),
        ((*GENERATE, "--top-p", "2"), "at most 1"),
        ((*GENERATE, "--greedy", "--top-k", "3"), "--top-k is for samples"),
        ((*GENERATE, "--greedy", "--num-samples", "2"), "all the same"),
        ((*GENERATE, "--num-samples", "0"), "num-samples"),
        ((*GENERATE, "--adapter", "empty"), "no LoRA adapter: it has no adapter_config.json"),
        ((*GENERATE, "--gpus", "1"), "--gpus 0"),
        ((*GENERATE, "--set", "oracle.max_tokens=3"), "nothing that this command reads"),
        ((*GENERATE, "--set", "placement.actors=3"), "nothing that this command reads"),
        ((*CHAT, "--set", "timeouts.generate_s=3"), "nothing that this command reads"),
        ((*JUDGED, "--set", "eval.best_of_n_temperature=3"), "nothing that this command reads"),
        ((*JUDGED, "--set", "oracle.flip_prob=0.5"), "nothing that this command reads"),
        ((*GENERATE, "--set", "sampling.top_q=3"), "there is no option sampling.top_q"),
        ((*CHAT, "--context-tokens", "129"), "the model takes 128"),
        ((*CHAT, "--system", "be kind"), "has none"),
        ((*CHAT, "--model", "reward"), "give a decoder language model"),
        (EVAL, "no oracle is given"),
        ((*JUDGED, "--top-p", "0.5"), "add --temperature"),
        ((*JUDGED,), "row 0 of split train of prompts.jsonl has no text in reference"),
        ((*JUDGED, "--against", "gone/"), "the other model gone/ does not exist"),
        ((*JUDGED, "--kl-to", "wide"), "another vocabulary"),
        ((*JUDGED, "--output", "out.txt"), ".jsonl or .json"),
        ((*JUDGED, "--oracle", "policy"), "no classification head"),
        ((*JUDGED, "--oracle-weights", "1,2"), "oracle.weights"),
        ((*JUDGED, "--set", "oracle.max_tokens=8"), "oracle takes 8 tokens"),
        ((*JUDGED, "--best-of-n", "0"), "best-of-n"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not Path("out.jsonl").exists() and not list(Path().glob(".out*"))


def test_what_is_worth_saying_of_an_oracle_is_said_before_anything_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    save_model(Path("chatty"), reward=True, tokenizer=byte_tokenizer(chat=True))
    capsys.readouterr()
    assert main([*EVAL, "--oracle", "chatty", "--max-new-tokens", "8"]) == 2  # for want of a reference
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("the reward model chatty has a chat template, and reads plain text")


def prompt_set(*texts: str, references: list[str] | None = None) -> PromptSet:
    return PromptSet(
        texts=list(texts),
        raw_texts=list(texts),
        tokens=[np.ones(2, np.int32) for _ in texts],
        references=references,
        rows=np.arange(len(texts)) * 10,
        num_dropped=0,
    )


def test_two_models_are_compared_on_the_rows_that_both_have_room_for() -> None:
    ours, theirs = prompt_set("a", "b", "c"), prompt_set("A", "B", "C")
    ours = dataclasses.replace(ours.select([0, 2]), num_dropped=1)
    theirs = dataclasses.replace(theirs.select([1, 2]), num_dropped=4)
    mine, other = _in_common(ours, theirs)
    assert (mine.texts, other.texts) == (["c"], ["C"]) and mine.rows.tolist() == other.rows.tolist() == [20]
    assert mine.num_dropped == 4
    with pytest.raises(ConfigError, match="no prompt fits both models; raise --max-prompt-tokens"):
        _in_common(ours.select([0]), theirs)


def response(sample: int, text: str) -> Response:
    return Response(sampling=0, prompt=0, sample=sample, text=text, tokens=[5, 0], logprob=-1.5, is_finished=True)


def test_a_row_per_sample() -> None:
    found = list(rows(prompt_set("p", "q", references=["r", "s"]), [[response(0, "a"), response(1, "b")], []]))
    common = {"row": 0, "prompt": "p", "reference": "r", "is_finished": True, "num_tokens": 2, "logprob": -1.5}
    assert found == [{**common, "sample": 0, "response": "a"}, {**common, "sample": 1, "response": "b"}]
    assert "reference" not in next(rows(prompt_set("p"), [[response(0, "a")]]))


def test_prompts_are_written_as_the_data_has_them() -> None:
    several = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert as_given(["p", "[{"]) == ["p", "[{"]
    assert as_given([several, "p"]) == [json.loads(several), [{"role": "user", "content": "p"}]]


def test_prompts_keep_the_order_of_their_split() -> None:
    lines = [{"prompt": "x" * 50 if i == 3 else f"p{i}"} for i in range(40)]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Config().data.model_copy(update={"prompts": "p.jsonl", "max_prompt_tokens": 10})
    found = load_all_prompts(data, byte_tokenizer())
    assert found.rows.tolist() == [i for i in range(40) if i != 3] and found.num_dropped == 1
    assert found.raw_texts[4] == "p5" == byte_tokenizer().decode(found.tokens[4])
    some = load_all_prompts(data.model_copy(update={"max_prompts": 7}), byte_tokenizer())
    assert len(some) == 7 and some.rows.tolist() == sorted(some.rows.tolist())
    assert some.rows.tolist() != found.rows.tolist()[:7]


def test_an_adapter_comes_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    import torch

    tensors = {f"base_model.model.layers.0.q_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    write_adapter(tmp_path, tensors, AdapterOptions(rank=2, alpha=4), base="policy")
    found, options = read_adapter(tmp_path)
    assert options == AdapterOptions(rank=2, alpha=4, targets=("q_proj",))
    assert {name for name, _ in found} == set(tensors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        read_adapter(tmp_path)


def summary(first_win: list[float], is_valid: list[bool]) -> dict[str, object]:
    num = len(first_win)
    prompts = prompt_set(*["p"] * num)
    verdicts = Verdicts(
        first_win=np.array(first_win, np.float32),
        is_valid=np.array(is_valid),
        first_scores=np.array(first_win, np.float32),
    )
    ours = _Side(["a"] * num, [3] * num, [True] * (num - 1) + [False])
    options = EvalOptions(config=Config(model=ModelConfig(path="m")), against="references")
    return as_json(_summary(options, prompts, ours, _Side(["b"] * num, [1] * num, None), verdicts, None))


def test_a_summary_counts_halves_and_leaves_out_what_has_no_verdict() -> None:
    found = summary([0.9, 0.5, 0.2, 0.7], [True, True, True, False])
    assert found["win_rate"] == 0.5 and found["num_judged"] == 3 and found["num_prompts"] == 4
    assert found["win_probability"] == pytest.approx(1.6 / 3) == found["reward"]
    assert found["opponent_reward"] is None and found["truncated"] == 0.25 and found["opponent_truncated"] is None
    assert found["response_tokens"] == 3 and found["opponent_tokens"] == 1


def test_a_summary_without_any_verdict_is_still_json() -> None:
    found = summary([math.nan, math.nan], [False, False])
    assert found["win_rate"] is None and found["interval"] == [0.0, 1.0]
    json.dumps(found, allow_nan=False)

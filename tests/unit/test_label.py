"""``oatlite label``: which rows are pairs, what is left out, and what is written."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oatlite_cli.main import main

from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.inference.judging import BLOCK
from oatlite.inference.label import LabelOptions, Pairs, labelled, read_pairs
from oatlite.oracles.base import Verdicts

LONGER = """
def score(response):
    return None if "?" in response else float(len(response))


def prefer(first, second, reference):
    return 0.9 if first == reference else 0.1 if second == reference else 0.5
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("judge.py").write_text(LONGER)


def write(*rows: dict[str, Any], name: str = "pairs.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def pair(first: str | None, second: str | None, **more: Any) -> dict[str, Any]:
    return {"prompt": "p", "response_a": first, "response_b": second, **more}


def run(*more: str) -> int:
    return main(["label", "--oracle", "judge.py:score", "--output", "out.jsonl", *more])


def read(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_an_empty_answer_is_judged_and_one_that_is_missing_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", write(pair("", "b"), pair(None, "b"), pair("", ""))) == 0
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in read()] == [("b", "", 1.0)]
    assert "1 without a text" in capsys.readouterr().out


def test_the_better_answer_is_chosen_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair("aaa", "b"), pair("a", "bb"), pair("a?", "b"), pair("ab", "cd"), pair("a", "a"), pair(None, "b")]
    assert run("--data", write(*rows)) == 0
    found = read()
    assert [(row["chosen"], row["rejected"]) for row in found] == [("aaa", "b"), ("bb", "a")]
    assert found[0] == {
        "prompt": "p",
        "chosen": "aaa",
        "rejected": "b",
        "win_probability": pytest.approx(1 / (1 + np.exp(-2))),
        "margin": 2.0,
        "chosen_reward": 3.0,
        "rejected_reward": 1.0,
    }
    assert found[1]["win_probability"] > 0.5 and found[1]["chosen_reward"] == 2 and found[1]["margin"] == 1
    out = capsys.readouterr().out
    assert "2 pairs; left out: 1 without a text, 1 with two equal answers, 1 without a verdict, 1 tied" in out
    assert "next: oatlite train --preferences out.jsonl --model POLICY --offline" in out


def test_an_oracle_that_compares_gives_no_rewards_and_reads_references() -> None:
    data = write({"q": "p", "x": "no", "y": "yes", "ref": "yes"})
    keys = ("--prompt-key", "q", "--first-key", "x", "--second-key", "y", "--reference-key", "ref")
    assert main(["label", "--oracle", "judge.py:prefer", "--output", "out.jsonl", "--data", data, *keys]) == 0
    [row] = read()
    assert set(row) == {"prompt", "chosen", "rejected", "win_probability", "margin"}
    assert row["chosen"] == "yes" and row["win_probability"] == pytest.approx(0.9)
    assert row["margin"] == pytest.approx(np.log(9), rel=1e-4)


def test_pairs_of_equal_answers_are_not_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    Path("picky.py").write_text("def prefer(first, second):\n    return 1 / (first != second)\n")
    data = write(pair("a", "a"), pair("a", "b"), pair("c", "c"))
    assert main(["label", "--oracle", "picky.py:prefer", "--output", "out.jsonl", "--data", data]) == 0
    assert [row["chosen"] for row in read()] == ["a"]
    assert "1 pairs; left out: 2 with two equal answers" in capsys.readouterr().out


def test_references_that_are_partly_there_are_not_dropped_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair("aa", "b", reference="aa"), pair("a", "bb", reference=None), pair("a", "bb", reference="")]
    data = write(*rows)
    assert main(["label", "--oracle", "judge.py:prefer", "--output", "out.jsonl", "--data", data]) == 2
    assert f"{data} lacks text in reference, in 2 of 3 pairs; leave these rows out" in capsys.readouterr().err


def test_references_that_nobody_reads_may_be_partly_there() -> None:
    data = write(pair("aa", "b", reference="aa"), pair("a", "bb", reference=None))
    model = Config.model_validate({"oracle": {"path": ["a-reward-model"]}})
    assert read_pairs(LabelOptions(config=model, data=data, output=Path("out.jsonl"))).references is None


def sampled(row: int, sample: Any, response: str, **more: Any) -> dict[str, Any]:
    return {"row": row, "sample": sample, "prompt": f"p{row}", "response": response, **more}


def test_two_samples_that_follow_each_other_are_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [sampled(0, n, "x" * (n + 1)) for n in range(4)] + [sampled(1, n, "y" * (3 - n)) for n in range(3)]
    assert run("--data", write(*rows)) == 0
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in read()]
    assert found == [("p0", "xx", "x"), ("p0", "xxxx", "xxx"), ("p1", "yyy", "yy")]
    assert "1 without a second sample" in capsys.readouterr().out


def test_conversations_are_prompts_too() -> None:
    messages = [{"role": "user", "content": "p"}]
    assert run("--data", write(pair("aa", "b") | {"prompt": messages})) == 0
    assert read()[0]["prompt"] == messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no oracle is given; add --oracle"),
        (("--oracle", "judge.py:nothing"), "judge.py has no nothing"),
        (("--oracle", "judge.py:score", "--set", "learner.lr=1"), "nothing that this command reads"),
        (("--oracle", "judge.py:score", "--first-key", "z"), "no column z; its columns are prompt, response_a"),
        (("--oracle", "judge.py:score", "--first-key", "response_b"), "both answers are of the column response_b"),
        (("--oracle", "judge.py:score", "--reference-key", "z"), "no column z"),
        (("--oracle", "judge.py:score", "--feedback", "loud"), "feedback"),
        (("--oracle", "judge.py:score", "--flip-prob", "2"), "at most 1"),
        (("--oracle", "judge.py:prefer"), "--reference-key"),
        (("--oracle", "remote"), "--oracle-url"),
        (("--oracle", "judge"), "--judge-model"),
        (("--oracle", "judge.py:score", "--output", "pairs.jsonl"), "--overwrite"),
        (("--oracle", "judge.py:score", "--split", "test"), "no split test"),
        (("--oracle", "judge.py:score", "--gpus", "1"), "--gpus 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(pair("aa", "b"), pair("a", "bb"))
    output = () if "--output" in arguments else ("--output", "out.jsonl")
    assert main(["label", "--data", data, *output, *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not Path("out.jsonl").exists()


def test_an_oracle_that_fails_in_the_middle_leaves_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("late.py").write_text("def score(response):\n    return float('inf') if response == 'bad' else 1.0\n")
    data = write(pair("a", "b"), pair("a", "bad"))
    assert main(["label", "--oracle", "late.py:score", "--output", "out.jsonl", "--data", data]) == 6
    assert "no finite number" in capsys.readouterr().err
    assert not list(Path().glob("*out.jsonl*"))


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Tests that run in the background of a shell have Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("1 / 0", 6, "raised ZeroDivisionError: division by zero; the first"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted; the first"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "terminated; the first"),
    ],
)
def test_what_was_answered_before_the_end_is_kept(
    end: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    score = "    return len(response) + float(response.startswith('b'))\n"
    Path("late.py").write_text(
        f"import os, signal\ndef whole(response):\n{score}"
        f"def score(response):\n    if response == 'last':\n        {end}\n{score}"
    )
    num = 2 * BLOCK + 5
    rows = [pair(f"a{n}", f"b{n}") for n in range(num)] + [pair("a", "last")]
    arguments = ("--data", write(*rows), "--flip-prob", "0.3")
    assert main(["label", "--oracle", "late.py:score", "--output", "out.jsonl", *arguments]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    kept = f"{2 * BLOCK} of {num + 1} pairs were answered, and {2 * BLOCK} are kept in out.jsonl.partial"
    assert words in said and kept in said
    assert not Path("out.jsonl").exists()
    assert main(["label", "--oracle", "late.py:whole", "--output", "out.jsonl", *arguments]) == 0
    assert read("out.jsonl.partial") == read()[: 2 * BLOCK]


def options(data: str, **more: Any) -> LabelOptions:
    return LabelOptions(config=Config(), data=data, output=Path("out.jsonl"), **more)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (pair("a", "b") | {"response_a": None}, "no row with a prompt and two answers"),
        (sampled(0, 0, "x"), "generate --num-samples 2"),
        ({"prompt": "p", "response_a": 1, "response_b": 2}, "no text"),
        (pair("a", "b") | {"prompt": [1, 2]}, "neither text nor lists of messages"),
        (pair("a", "b", reference=None), "lacks text in reference, in 1 of 1 pairs"),
        (pair("a", "a"), "all have two equal answers"),
        (sampled(0, "zero", "x"), "sample holds what is no whole number"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_pairs(options(write(row), reference_key="reference" if "lacks" in words else None))


def test_all_tied_is_no_file() -> None:
    assert run("--data", write(pair("ab", "cd"))) == 2
    assert not Path("out.jsonl").exists()


def many(num: int) -> tuple[Pairs, Verdicts]:
    first, second = [f"a{n}" for n in range(num)], [f"b{n}" for n in range(num)]
    pairs = Pairs(prompts=["p"] * num, first=first, second=second, references=None, num_empty=0)
    return pairs, Verdicts(first_win=np.full(num, 0.8, np.float32), is_valid=np.ones(num, np.bool_))


def share_of_first(num: int = 4000, **oracle: Any) -> tuple[float, int]:
    config = Config(oracle=oracle)
    rows, result = labelled(*many(num), config)
    assert (rows, result) == labelled(*many(num), config), "the seed decides"
    for row in rows:
        assert row["win_probability"] == pytest.approx(0.8 if row["chosen"].startswith("a") else 0.2)
    return sum(row["chosen"].startswith("a") for row in rows) / num, result.num_flipped


def test_feedback_and_noise() -> None:
    assert share_of_first() == (1.0, 0)
    share, num_flipped = share_of_first(flip_prob=0.1)
    assert share == pytest.approx(0.9, abs=0.02) and num_flipped == round((1 - share) * 4000)
    share, _ = share_of_first(feedback="bernoulli")
    assert share == pytest.approx(0.8, abs=0.02)
    share, _ = share_of_first(feedback="bernoulli", flip_prob=0.5)
    assert share == pytest.approx(0.5, abs=0.03)

"""``oatlite sft`` and ``oatlite reward-model``, and the demo that they build: from a file to a folder that loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from oatlite_cli.main import main
from safetensors.torch import load_file
from small_demo import SMALL_DEMO
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from oatlite.continuations import encode
from oatlite.demo.build import cache_root, ensure_demo
from oatlite.errors import ConfigError
from oatlite.reward_loss import EncodedRanking, bradley_terry, can_share_prompts
from oatlite.reward_modeling import rank_pairs, rank_references
from oatlite.tiny import TinyShape, new_tiny_model, tiny_config, train_bpe

COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "coal": "black", "snow": "white"}
ROWS = [
    {
        "prompt": f"Question {i}: what colour is {thing}?",
        "reference": f" It is {colour}.",
        "chosen": f" It is {colour}.",
        "rejected": " I do not know, I do not know.",
    }
    for i in range(40)
    for thing, colour in COLOURS.items()
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def policy(data: Path) -> Path:
    return sft(data, data.parent / "policy", "--epochs", "14")


@pytest.fixture(scope="module")
def reward_model(data: Path, policy: Path) -> Path:
    output = data.parent / "reward"
    train = ["reward-model", "--model", str(policy), "--data", str(data), "--output", str(output)]
    assert main([*train, "--lr", "5e-4", "--batch-size", "8"]) == 0
    return output


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(data: Path, output: Path, *more: str) -> Path:
    arguments = ["sft", "--model", "tiny-llama", "--data", str(data), "--output", str(output), "--vocab-size", "400"]
    assert main([*arguments, "--batch-tokens", "512", *more]) == 0
    return output


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_policy_answers_what_it_was_taught(policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for thing, colour in COLOURS.items():
        prompt = tokenizer(f"Question 3: what colour is {thing}?", return_tensors="pt")["input_ids"]
        made = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        assert made[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(made, skip_special_tokens=True) == f" It is {colour}."


def test_sft_says_what_it_made_and_what_comes_next(data: Path, tmp_path: Path, capsys) -> None:
    output = sft(data, tmp_path / "model", "--epochs", "1")
    printed, said = capsys.readouterr()
    summary, following = printed.splitlines()
    assert all(line.startswith("policy: ") for line in re.split(r"[\r\n]+", said.strip())), "no word of a library"
    assert summary.startswith(f"{output}: ")
    assert re.search(r"190 rows, held-out loss \d\.\d{3} nats", summary)
    assert following.startswith(f"next: oatlite reward-model --model {output} --data {data} --output ")
    assert following.endswith(" --lr 3e-4")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_equal_seeds_give_equal_policies(data: Path, tmp_path: Path) -> None:
    runs = [sft(data, tmp_path / str(i), "--epochs", "1", "--seed", str(seed)) for i, seed in enumerate((7, 7, 8))]
    first, second, third = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_training_goes_on_from_a_folder(data: Path, policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "more"
    arguments = ["sft", "--model", str(policy), "--data", str(data), "--output", str(output), "--epochs", "1"]
    assert main([*arguments, "--lr", "1e-6"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (policy, output))
    largest = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < largest < 1e-4


def test_reward_model_prefers_the_chosen_text_read_at_its_end(reward_model: Path, capsys) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    prompt = "Question 50: what colour is grass?"
    texts = [" It is green.", " I do not know, I do not know."]
    sequences = [before + after for before, after in (encode(tokenizer, prompt, text) for text in texts)]
    longest = max(map(len, sequences))
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in sequences])
    together = model(input_ids=padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits[:, 0]
    alone = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    assert torch.allclose(together, alone, atol=1e-4)
    assert together[0] > together[1]
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_reward_model_reports_its_accuracy(data: Path, tmp_path: Path, capsys) -> None:
    train = ["reward-model", "--model", "tiny-neox", "--data", str(data), "--output", str(tmp_path / "reward")]
    assert main([*train, "--vocab-size", "400", "--batch-tokens", "512", "--lr", "5e-4"]) == 0
    summary, following = capsys.readouterr().out.splitlines()
    assert float(re.findall(r"held-out accuracy (\d\.\d+) on 10", summary)[0]) > 0.9
    assert f"--oracle {tmp_path / 'reward'} --prompts {data}" in following


@pytest.mark.parametrize("command", ["sft", "reward-model"])
def test_mistakes_take_one_line(command: str, data: Path, tmp_path: Path, capsys) -> None:
    train = [command, "--model", "tiny-llama", "--data", str(data), "--output", str(tmp_path / "new")]
    missing = ["--reference-key", "answer"] if command == "sft" else ["--chosen-key", "answer"]
    error = error_of(capsys, *train, *missing)
    assert "answer" in error
    assert "prompt, reference, chosen, rejected" in error
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    assert "is not empty" in error_of(capsys, *train[:-1], str(full))
    assert "--max-tokens" in error_of(capsys, *train, "--max-tokens", "3", "--vocab-size", "400")
    assert str(tmp_path / "gone") in error_of(capsys, command, "--model", str(tmp_path / "gone"), *train[3:])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_a_loss_that_diverges_names_the_learning_rate(data: Path, tmp_path: Path, capsys) -> None:
    train = ["sft", "--model", "tiny-llama", "--data", str(data), "--output", str(tmp_path / "new"), "--lr", "1e38"]
    capsys.readouterr()
    assert main([*train, "--vocab-size", "400", "--batch-tokens", "512"]) == 2
    assert "lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_pairs_of_one_prompt_are_gathered_and_equal_ones_left_out() -> None:
    pairs = [("p", "a", "b"), ("q", "c", "d"), ("p", "a", "e"), ("q", "f", "f")]
    first, second = rank_pairs(pairs)
    assert (first.prompt, first.texts, first.wins) == ("p", ("a", "b", "e"), ((0, 1), (0, 2)))
    assert (second.prompt, second.texts, second.wins) == ("q", ("c", "d"), ((0, 1),))
    with pytest.raises(ConfigError, match="equal"):
        rank_pairs([("p", "a", "a")])


def test_without_pairs_a_reference_meets_that_of_another_row() -> None:
    rows = [(f"p{i}", f"r{i}") for i in range(20)]
    rankings = rank_references(rows, seed=1)
    assert [ranking.prompt for ranking in rankings] == [prompt for prompt, _ in rows]
    for i, ranking in enumerate(rankings):
        own, other = ranking.texts
        assert own == f" r{i}" != other
    assert len({ranking.texts[1] for ranking in rankings}) == 20
    assert rank_references(rows, seed=2) != rankings


@pytest.mark.parametrize("prefix_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-neox"])
def test_sharing_a_prompt_changes_no_loss(name, prefix_weight: float) -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["abc"], 258)
    config = tiny_config(name, tokenizer, TinyShape(hidden_size=64, num_layers=2, max_positions=64))
    config.num_labels = 1
    model = new_tiny_model(AutoModelForSequenceClassification, config).eval()
    rankings = [
        EncodedRanking([10, 11, 12, 13], [[20, 21, 0], [20, 22, 0], [30, 0]], [(0, 1), (0, 2)]),
        EncodedRanking([14, 15], [[23, 0], [24, 25, 26, 27, 0]], [(1, 0)]),
    ]
    assert can_share_prompts(model, rankings[0])
    losses = [bradley_terry(model, rankings, prefix_weight=prefix_weight, shared=shared) for shared in (True, False)]
    assert torch.allclose(*losses, atol=1e-5)
    ends = [
        [float(model(input_ids=torch.tensor([r.prompt + text])).logits[0, 0].detach()) for text in r.responses]
        for r in rankings
    ]
    margins = torch.tensor([ends[i][a] - ends[i][b] for i, r in enumerate(rankings) for a, b in r.wins])
    plain = -torch.nn.functional.logsigmoid(margins).mean()
    assert torch.allclose(losses[0], plain, atol=1e-5) is (prefix_weight == 0)


def test_prefixes_of_unequal_texts_alone_leave_the_plain_loss() -> None:
    tokenizer = train_bpe(["abc"], 258)
    config = tiny_config("tiny-llama", tokenizer, TinyShape(hidden_size=64, num_layers=1, max_positions=64))
    config.num_labels = 1
    model = new_tiny_model(AutoModelForSequenceClassification, config).eval()
    ranking = EncodedRanking([10], [[20, 0], [20, 21, 0]], [(0, 1)])
    with_prefixes, plain = (bradley_terry(model, [ranking], prefix_weight=w, shared=True) for w in (1.0, 0.0))
    assert torch.equal(with_prefixes, plain)


# The demo, at a hundredth of its size


def test_demo_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stages: set[str] = set()
    paths = ensure_demo(lambda stage, *_: stages.add(stage), SMALL_DEMO)
    assert stages == {"policy", "reward model"}
    for split, num in (("train", SMALL_DEMO.num_train), ("test", SMALL_DEMO.num_test)):
        rows = [json.loads(line) for line in (paths.prompts / f"{split}.jsonl").read_text().splitlines()]
        assert [set(row) for row in rows] == [{"prompt", "reference"}] * num
    AutoModelForCausalLM.from_pretrained(paths.policy)
    assert AutoModelForSequenceClassification.from_pretrained(paths.reward_model).config.num_labels == 1
    stages.clear()
    assert ensure_demo(lambda stage, *_: stages.add(stage), SMALL_DEMO) == paths
    assert not stages
    assert [path.name for path in cache_root().iterdir()] == [paths.policy.parent.name]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(stage: str, *_: object) -> None:
        if stage == "reward model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo(fail, SMALL_DEMO)
    assert list(cache_root().iterdir()) == []

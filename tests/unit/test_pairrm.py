"""PairRM: equal to the published network's steps done one pair at a time, in both orders, whatever the batch."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_folders import byte_tokenizer
from small_pairrm import PREFIXES, pair_tokenizer, save_pairrm

from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config, OracleConfig
from oatlite.errors import ConfigError, OracleError
from oatlite.oracles import build_oracle
from oatlite.oracles.pairrm import PairRM, PairRMOracle

PROMPTS = ["sum up: one two three", "b", "sum up: one two three", "d" * 40]
FIRST = ["one", "the first is longer", "one", ""]
SECOND = ["two three", "no", "one", "x y"]


def test_it_equals_the_published_steps_pair_by_pair_and_averages_both_orders(tmp_path):
    path, logit = save_pairrm(tmp_path / "pairrm")
    expected = []
    for prompt, one, other in zip(PROMPTS, FIRST, SECOND, strict=True):
        forward, backward = logit(prompt, one, other), logit(prompt, other, one)
        expected.append(1 / (1 + np.exp(-(forward - backward) / 2)))
    assert np.ptp(expected) > 0.05, "the pairs must be told apart for this to show anything"
    for batch_tokens in (1, 150, 10_000):
        oracle = build_oracle([path], Config(oracle=OracleConfig(batch_tokens=batch_tokens)), device="cpu")
        assert isinstance(oracle, PairRMOracle)
        verdicts = oracle.compare(PROMPTS, FIRST, SECOND)
        np.testing.assert_allclose(verdicts.first_win, expected, atol=1e-5)
        assert verdicts.is_valid.all()
        assert verdicts.first_scores is None


def test_ids_and_logits_of_one_order_are_the_published_ones(tmp_path):
    path, logit = save_pairrm(tmp_path / "pairrm")
    oracle, tokenizer = PairRMOracle(path, batch_tokens=150), pair_tokenizer()
    triples = [*zip(PROMPTS, FIRST, SECOND, strict=True), *zip(PROMPTS, SECOND, FIRST, strict=True)]
    for triple in triples:
        parts = [tokenizer(prefix + text)["input_ids"] for prefix, text in zip(PREFIXES, triple, strict=True)]
        ids, prefixes = oracle.encode(*triple)
        assert ids == [*parts[0], *parts[1], *parts[2]]
        assert prefixes == [1, len(parts[0]) + 1, len(parts[0]) + len(parts[1]) + 1]
    expected = [logit(*triple) for triple in triples]
    assert abs(expected[0] + expected[4]) > 1e-3, "one order alone leans to a side"
    np.testing.assert_allclose(oracle._logits(triples), expected, atol=1e-5)


def test_a_conversation_is_read_as_plain_text(tmp_path):
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "bye")]
    prompt = json.dumps([{"role": role, "content": content} for role, content in turns])
    written = "User: hi\n\nAssistant: yes?\n\nUser: bye"
    assert oracle.encode(prompt, "a", "b") == oracle.encode(written, "a", "b")
    np.testing.assert_array_equal(oracle.features([prompt], ["a"]), oracle.features([written], ["a"]))


def test_swapped_responses_swap_the_verdict_exactly_and_equal_ones_tie(tmp_path):
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    there, back = oracle.compare(PROMPTS, FIRST, SECOND), oracle.compare(PROMPTS, SECOND, FIRST)
    np.testing.assert_allclose(there.first_win + back.first_win, 1.0, atol=1e-6)
    assert oracle.compare(["p"], ["same"], ["same"]).first_win.tolist() == [0.5]


def test_close_verdicts_are_not_tied_by_bfloat16(tmp_path):
    path, _ = save_pairrm(tmp_path / "pairrm")
    exact, rounded = PairRMOracle(path), PairRMOracle(path, dtype="bfloat16")
    assert rounded.model.pretrained_model.dtype == torch.bfloat16
    verdicts = rounded.compare(PROMPTS, FIRST, SECOND).first_win
    np.testing.assert_allclose(verdicts, exact.compare(PROMPTS, FIRST, SECOND).first_win, atol=0.05)
    assert (torch.from_numpy(verdicts).bfloat16().float().numpy() != verdicts).sum() >= 3, "rounded to bfloat16"


def test_a_response_cannot_pose_as_a_prefix(tmp_path):
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    ids, prefixes = oracle.encode("a<|candidate1|>", "b<|source|>", "c")
    assert oracle.tokenizer.convert_ids_to_tokens([ids[i] for i in prefixes]) == PREFIXES
    assert prefixes == [1, 6, 11]


def test_a_pair_longer_than_the_limit_is_not_valid(tmp_path):
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0], max_tokens=40)
    verdicts = oracle.compare(PROMPTS, FIRST, SECOND)
    assert verdicts.is_valid.tolist() == [False, True, True, False]


def test_a_logit_that_is_no_number_ends_it(tmp_path):
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    oracle.model.head_layer[4].bias.fill_(torch.inf)
    with pytest.raises(OracleError, match="not finite"):
        oracle.compare(["p"], ["a"], ["b"])


def test_what_is_no_complete_pairrm_is_refused_in_a_line(tmp_path):
    path, _ = save_pairrm(tmp_path / "torn", leave_out=["head_layer.4.weight"])
    with pytest.raises(ConfigError, match=r"lack head_layer\.4\.weight"):
        PairRMOracle(path)
    path, _ = save_pairrm(tmp_path / "foreign")
    byte_tokenizer().save_pretrained(path)
    with pytest.raises(ConfigError, match="does not know the token"):
        PairRMOracle(path)


def test_the_published_names_load_whole(tmp_path):
    """As they stand in the published file, whatever the installed transformers calls its own layers."""
    path, _ = save_pairrm(tmp_path / "pairrm")
    dense = [
        *(f"attention.self.{part}_proj" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
        *("attention.output.LayerNorm", "output.LayerNorm"),
    ]
    modules = [
        "embeddings.LayerNorm",
        "encoder.LayerNorm",
        *(f"encoder.layer.{n}.{name}" for n in (0, 1) for name in dense),
    ]
    modules = [f"pretrained_model.{name}" for name in modules] + ["head_layer.1", "head_layer.4"]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names |= {f"pretrained_model.{name}.weight" for name in ("embeddings.word_embeddings", "encoder.rel_embeddings")}
    with safe_open(f"{path}/model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    _, info = PairRM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_weights_that_it_has_no_place_for_are_refused(tmp_path):
    path, _ = save_pairrm(tmp_path / "pairrm")
    file = tmp_path / "pairrm" / "model.safetensors"
    save_file(load_file(file) | {"head_layer.9.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"hold head_layer\.9\.weight, which PairRM has no place for"):
        PairRMOracle(path)


def test_it_takes_as_much_as_it_was_made_for_unless_told(tmp_path):
    path = save_pairrm(tmp_path / "pairrm")[0]
    found = [
        build_oracle([path], Config(oracle=OracleConfig(max_tokens=n)), device="cpu").max_tokens for n in (None, 99)
    ]
    assert found == [2048, 99]


def test_its_name_stands_for_the_published_checkpoint():
    config = resolve(load_config(preset="demo", flags={"oracle.path": "pairrm"}, num_gpus=0), 0)
    assert config.oracle.path == ("llm-blender/PairRM-hf",)

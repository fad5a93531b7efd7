"""Features for the epistemic head: the states that rewards are read from, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_folders import byte_tokenizer, save_model
from small_pairrm import HIDDEN, save_pairrm
from transformers import AutoModel, BertConfig, BertModel

from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.oracles import build_oracle
from oatlite.oracles.features import ModelEncoder, build_encoder
from oatlite.oracles.pairrm import PairRMOracle
from oatlite.oracles.reward_model import RewardModelOracle

PROMPTS = ["sum up: one two", "b", "sum up: one two", "sum up: one two", "d" * 20]
RESPONSES = [" one", " the other", " two and three", "", " x"]


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_reward_is_the_head_of_its_features(family: str, tmp_path: Path) -> None:
    path = save_model(tmp_path / "rm", family, reward=True)
    oracle = RewardModelOracle(path)
    features = oracle.features(PROMPTS, RESPONSES)
    head = oracle.model.score.weight.detach().numpy()
    assert features.shape == (5, head.shape[1]) and features.dtype == np.float32
    np.testing.assert_allclose(features @ head[0], oracle.score(PROMPTS, RESPONSES), atol=1e-5)
    np.testing.assert_allclose(
        RewardModelOracle(path, batch_tokens=40).features(PROMPTS, RESPONSES), features, atol=1e-5
    )
    alone = [oracle.features([prompt], [text])[0] for prompt, text in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(alone, features, atol=1e-5)


def test_what_is_too_long_has_no_features(tmp_path: Path) -> None:
    path = save_model(tmp_path / "rm", reward=True)
    oracle, encoder = RewardModelOracle(path, max_tokens=18), ModelEncoder(path, max_tokens=18)
    for one in (oracle, encoder):
        assert np.isnan(one.features(PROMPTS, RESPONSES)).all(axis=1).tolist() == [True, False, True, False, True]


def test_features_of_pairrm_are_the_states_at_two_prefixes(tmp_path: Path) -> None:
    oracle = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    features = oracle.features(PROMPTS, RESPONSES)
    assert features.shape == (5, 2 * HIDDEN)
    for row, prompt, text in zip(features, PROMPTS, RESPONSES, strict=True):
        ids, prefixes = oracle.encode(prompt, text)
        assert len(prefixes) == 2
        with torch.no_grad():
            hidden = oracle.model.pretrained_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden[prefixes].flatten().numpy(), atol=1e-5)


def test_any_decoder_or_encoder_serves(tmp_path: Path) -> None:
    decoder = save_model(tmp_path / "decoder", "llama")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    for path, place in ((decoder, -1), (str(tmp_path / "encoder"), 0)):
        features = ModelEncoder(path, batch_tokens=64).features(PROMPTS, RESPONSES)
        model = AutoModel.from_pretrained(path).eval()
        for row, prompt, text in zip(features, PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
            with torch.no_grad():
                np.testing.assert_allclose(row, model(input_ids=ids).last_hidden_state[0, place], atol=1e-5)


def test_the_oracle_is_the_encoder_unless_another_is_named(tmp_path: Path) -> None:
    path = save_model(tmp_path / "rm", reward=True)
    other = save_model(tmp_path / "other", "neox")
    oracle = build_oracle([path], Config(), device="cpu")
    assert build_encoder(Config(), oracle, device="cpu") is oracle
    named = Config.model_validate({"explore": {"encoder": other}, "oracle": {"path": path}})
    assert isinstance(build_encoder(named, oracle, device="cpu"), ModelEncoder)
    pair = Config.model_validate({"explore": {"encoder": save_pairrm(tmp_path / "pairrm")[0]}})
    assert isinstance(build_encoder(pair, oracle, device="cpu"), PairRMOracle)
    function = build_oracle(["oatlite.oracles.checkers:number"], Config(), device="cpu")
    with pytest.raises(ConfigError, match=r"explore\.encoder"):
        build_encoder(Config(), function, device="cpu")

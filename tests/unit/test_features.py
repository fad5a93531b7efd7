"""Features for the epistemic head: the states that rewards are read from, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_folders import byte_tokenizer, save_model
from small_pairrm import HIDDEN, save_pairrm
from transformers import AutoModel, BertConfig, BertModel

from oatlite.config.load import dump_toml
from oatlite.config.schema import Config
from oatlite.epistemic import save_head
from oatlite.errors import ConfigError, OracleError
from oatlite.maths.ensemble import EpistemicHead
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


def test_states_that_are_no_numbers_are_not_taken_for_what_is_too_long(tmp_path: Path) -> None:
    """Else every prompt would be left out, and a run train on nothing."""
    path = save_model(tmp_path / "rm", reward=True)
    pairrm = PairRMOracle(save_pairrm(tmp_path / "pairrm")[0])
    reward_model, another = RewardModelOracle(path), ModelEncoder(path)
    models = {pairrm: pairrm.model.pretrained_model, reward_model: reward_model.model, another: another.model}
    for encoder, model in models.items():
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(torch.nan)
        with pytest.raises(OracleError, match=r"that are not finite; try oracle\.dtype = float32"):
            encoder.features(PROMPTS, RESPONSES)


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


def test_the_readme_ranks_answers_by_the_head_that_a_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = save_model(tmp_path / "rm", reward=True)
    run = tmp_path / "runs" / "mine"
    (run / "head").mkdir(parents=True)
    config = Config.model_validate({"oracle": {"path": [oracle]}, "model": {"path": oracle}, "data": {"prompts": "p"}})
    (run / "config.toml").write_text(dump_toml(config))
    answers = [" one", " two and three", " four"]
    features = torch.from_numpy(RewardModelOracle(oracle).features(["sum up: "] * 3, answers))
    head = EpistemicHead(features.shape[1], num_members=4, hidden_size=8, seed=3)
    save_head(run / "head", head, encoder=oracle)

    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block.partition("```")[0] for block in text.split("```python\n")[1:] if "load_head" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"prompt": "sum up: ", "answers": answers}
    exec(code, names)
    torch.testing.assert_close(names["rewards"], head(features))
    assert names["best"] == answers[int(head(features).mean(0).argmax())]
    assert len(set(head(features).mean(0).tolist())) == 3


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

"""Oracles: Bradley-Terry, what is checked of an answer, and a reward model that scores alike alone and in a batch."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from small_folders import byte_tokenizer, save_model
from small_pairrm import save_pairrm
from transformers import AutoModelForSequenceClassification

from oatlite.config.schema import Config, ModelConfig, OracleConfig
from oatlite.errors import ConfigError, OracleError
from oatlite.oracles import RewardOracle, Verdicts, build_oracle, checked, draw_verdicts, trainable_pairs
from oatlite.oracles.reward_model import RewardModelOracle, check_reward_model


class LengthOracle(RewardOracle):
    """The longer, the better; it cannot score an empty response."""

    def __init__(self):
        self.asked = []

    def score(self, prompts, responses, references=None):
        self.asked += list(zip(prompts, responses, strict=True))
        return np.array([len(text) or np.nan for text in responses], np.float32)


def test_compare_is_bradley_terry_and_scores_each_response_once():
    oracle = LengthOracle()
    verdicts = oracle.compare(["p", "p", "q", "q"], ["aaa", "b", "aaa", ""], ["b", "aaa", "ccc", "b"])
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5, 0.5]
    np.testing.assert_allclose(verdicts.first_win, expected, rtol=1e-6)
    assert verdicts.first_win.dtype == np.float32
    assert verdicts.is_valid.tolist() == [True, True, True, False]
    assert verdicts.first_scores[:3].tolist() == [3, 1, 3]
    assert verdicts.second_scores.tolist() == [1, 3, 3, 1]
    assert len(oracle.asked) == len(set(oracle.asked)) == 6
    checked(verdicts, 4)


def test_a_huge_difference_is_a_certain_win():
    oracle = LengthOracle()
    oracle.score = lambda prompts, responses, references=None: np.array([-2e4, 2e4], np.float32)
    assert oracle.compare(["p"], ["a"], ["b"]).first_win.tolist() == [0.0]


@pytest.mark.parametrize(
    ("scores", "words"), [([1.0], "shape"), ([1.0, 2.0, 3.0], "shape"), ([1.0, np.inf], "infinite")]
)
def test_scores_are_checked(scores, words):
    oracle = LengthOracle()
    oracle.score = lambda prompts, responses, references=None: np.array(scores, np.float32)
    with pytest.raises(OracleError, match=words):
        oracle.compare(["p"], ["a"], ["b"])


def verdicts_of(first_win, is_valid=None, **scores):
    valid = np.ones(len(first_win), bool) if is_valid is None else np.array(is_valid)
    arrays = {name: np.array(value, np.float32) for name, value in scores.items()}
    return Verdicts(first_win=np.array(first_win, np.float32), is_valid=valid, **arrays)


def test_joined_verdicts_have_rewards_only_where_all_parts_have_them():
    scored = verdicts_of([0.9, 0.5], [True, False], first_scores=[2.0, np.nan], second_scores=[1.0, 0.0])
    alone = dataclasses.replace(verdicts_of([0.25]), num_failures=3)
    both, mixed = Verdicts.joined([scored, scored]), Verdicts.joined([scored, alone])
    np.testing.assert_array_equal(both.first_scores, np.array([2, np.nan, 2, np.nan], np.float32))
    assert both.second_scores.tolist() == [1, 0, 1, 0] and both.is_valid.tolist() == [True, False] * 2
    assert mixed.first_win.tolist() == pytest.approx([0.9, 0.5, 0.25]) and mixed.first_scores is None
    assert (both.num_failures, mixed.num_failures) == (0, 3)
    assert len(checked(Verdicts.joined([]), 0)) == 0


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (verdicts_of([0.5]), "2 pairs"),
        (verdicts_of([0.5, 1.5]), "1.5"),
        (verdicts_of([-0.1, 0.5]), "-0.1"),
        (verdicts_of([0.5, np.nan]), "not finite"),
        (verdicts_of([0.5, 0.5], [1, 1]), "not bool"),
        (verdicts_of([0.5, 0.5], [True]), "is_valid"),
        (verdicts_of([0.5, 0.5], first_scores=[1.0]), "first_scores"),
        (verdicts_of([0.5, 0.5], second_scores=[1.0, np.nan]), "second_scores"),
    ],
)
def test_answers_are_checked(verdicts, words):
    with pytest.raises(OracleError, match=words):
        checked(verdicts, 2)


def test_a_verdict_that_is_not_valid_may_hold_anything():
    verdicts = verdicts_of([np.nan, 0.5], [False, True], first_scores=[np.nan, 1.0])
    assert checked(verdicts, 2).is_valid.tolist() == [False, True]


def test_threshold_takes_the_likelier_side():
    wins, valid = np.float32([0.9, 0.1, 0.5, 0.9]), np.array([True, True, True, False])
    drawn = draw_verdicts(wins, valid, "threshold", np.random.default_rng(0))
    assert drawn.tolist() == [True, False, False, False]


def test_bernoulli_draws_with_the_win_probability():
    wins = np.repeat(np.float32([0.0, 0.3, 1.0]), 20_000)
    valid = np.ones(60_000, bool)
    drawn = draw_verdicts(wins, valid, "bernoulli", np.random.default_rng(0)).reshape(3, -1)
    assert drawn[0].sum() == 0
    assert drawn[1].mean() == pytest.approx(0.3, abs=0.015)
    assert drawn[2].all()
    again = draw_verdicts(wins, valid, "bernoulli", np.random.default_rng(0)).reshape(3, -1)
    assert (drawn == again).all()


def test_later_draws_do_not_depend_on_the_mode():
    after = []
    for feedback in ("threshold", "bernoulli"):
        rng = np.random.default_rng(3)
        draw_verdicts(np.float32([0.2, 0.8]), np.ones(2, bool), feedback, rng)
        after.append(rng.random())
    assert after[0] == after[1]


def test_pairs_without_a_preference_are_not_trained_on():
    verdicts = verdicts_of([0.9, 0.5, 0.5, 0.9], [True, True, True, False])
    first, second = ["a", "same", "a", "a"], ["b", "same", "b", "b"]
    assert trainable_pairs(verdicts, first, second, "threshold").tolist() == [True, False, False, False]
    assert trainable_pairs(verdicts, first, second, "bernoulli").tolist() == [True, False, True, False]


PROMPTS = ["say something: ", "x", "a much longer prompt than the others: ", "x"]
RESPONSES = ["yes", "", "short", "a rather long response, so that the others are padded"]
PADS = {"own pad": {"pad_token_id": 2}, "no pad": {"pad_token_id": None}, "pad is eos": {"pad_token_id": 0}}


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_score_is_the_same_alone_and_in_a_padded_batch(tmp_path, family, pad):
    path = save_model(tmp_path / "rm", family, reward=True, **PADS[pad])
    oracle = RewardModelOracle(path)
    together = oracle.score(PROMPTS, RESPONSES)
    alone = [oracle.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert np.ptp(together) > 1e-2


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_score_is_the_one_that_training_sees(tmp_path, family):
    """The models' own forward, on a single sequence, reads the score at the last token when pad differs from it."""
    path = save_model(tmp_path / "rm", family, reward=True)
    tokenizer, oracle = byte_tokenizer(), RewardModelOracle(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for prompt, response, text in [("say: ", "yes", "say: yes"), ("say:", "yes", "say: yes"), ("say:", "", "say:")]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert oracle.encode([prompt], [response]) == [ids]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert oracle.score([prompt], [response])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_responses_that_share_a_prompt_score_as_each_does_alone(tmp_path, family, attention):
    path = save_model(tmp_path / "rm", family, reward=True, initializer_range=0.5)
    oracle = RewardModelOracle(path)
    if attention == "eager":
        oracle.model.set_attn_implementation("eager")
        oracle._prefix_scores.takes_prompt_masks = False
        oracle._layout = oracle._prefix_scores.layout(oracle.max_tokens)
    assert oracle._layout == {"sdpa": "shared", "eager": "masked"}[attention]
    prompts = [*["say: "] * 5, "x", "a rather long prompt that stands alone: "]
    responses = ["yes", "yes", "yes and no", "", "quite another one", "z", "w"]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in oracle.encode(prompts, responses)]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(oracle.score(prompts, responses), expected, atol=1e-4)


def test_a_model_that_takes_no_such_mask_scores_one_response_at_a_time(tmp_path, caplog):
    path = save_model(tmp_path / "rm", reward=True)
    oracle = RewardModelOracle(path)
    forward = oracle.model.base_model.forward

    def fake_that_ignores_masks(*arguments, attention_mask, **more):
        return forward(*arguments, attention_mask=attention_mask if attention_mask.ndim == 2 else None, **more)

    oracle.model.base_model.forward = fake_that_ignores_masks
    assert oracle._prefix_scores.layout(oracle.max_tokens) == "plain"
    assert "rewards differ by" in caplog.text


def test_encoding_is_the_trainers(tmp_path):
    from oatlite.continuations import encode

    tokenizer = byte_tokenizer(bos=True)
    oracle = RewardModelOracle(save_model(tmp_path / "rm", reward=True, tokenizer=tokenizer))
    for prompt, response in [("say:", " yes"), ("say: ", "yes"), ("say:", "yes")]:
        before, after = encode(tokenizer, prompt, response)
        assert oracle.encode([prompt], [response]) == [[*before, *after]]


def test_code_that_comes_with_a_reward_model_runs_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = save_model(tmp_path / "rm", reward=True)
    own = (
        "from transformers import LlamaForSequenceClassification\n\n\nclass Own(LlamaForSequenceClassification): ...\n"
    )
    (tmp_path / "rm" / "own.py").write_text(own)
    file = tmp_path / "rm" / "config.json"
    auto_map = {"AutoModelForSequenceClassification": "own.Own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["Own"], "auto_map": auto_map}))
    for trusted, expected in ((True, "Own"), (False, "LlamaForSequenceClassification")):
        config = Config(model=ModelConfig(trust_remote_code=trusted))
        assert type(build_oracle([path], config, device="cpu").model).__name__ == expected


@pytest.mark.parametrize("family", ["rm", "pairrm"])
def test_a_batch_that_memory_does_not_hold_names_the_option_to_lower(tmp_path, monkeypatch, family):
    def fake_gpu_that_is_full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    path = save_model(tmp_path / "rm", reward=True) if family == "rm" else save_pairrm(tmp_path / "pairrm")[0]
    oracle = build_oracle([path], Config(), device="cpu")
    monkeypatch.setattr(oracle, "_rewards" if family == "rm" else "_forward", fake_gpu_that_is_full)
    with pytest.raises(
        OracleError, match=r"memory in a batch of 8192 tokens; lower .* oracle\.batch_tokens = 4096"
    ) as caught:
        oracle.compare(["p"], ["a"], ["b"])
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_small_batches_give_the_same_scores_and_stay_within_their_tokens(tmp_path, monkeypatch):
    path = save_model(tmp_path / "rm", reward=True)
    prompts = [f"prompt {'x' * (i % 7)}" for i in range(23)]
    responses = [f" response {'y' * (i % 11)}" for i in range(23)]
    large = RewardModelOracle(path).score(prompts, responses)
    small = RewardModelOracle(path, batch_tokens=100)
    shapes = []
    forward = small._rewards

    def noted(pairs):
        responses = sum(1 + (len(pair.rejected) > 0) for pair in pairs)
        shapes.append((responses, len(pairs), max(pair.num_tokens for pair in pairs)))
        return forward(pairs)

    monkeypatch.setattr(small, "_rewards", noted)
    np.testing.assert_allclose(small.score(prompts, responses), large, atol=1e-5)
    assert sum(responses for responses, _, _ in shapes) == 23
    assert 23 > sum(rows for _, rows, _ in shapes) > len(shapes)
    assert all(rows * longest <= 100 for _, rows, longest in shapes)


def test_what_is_too_long_gets_no_score_and_no_verdict(tmp_path):
    path = save_model(tmp_path / "rm", reward=True)
    oracle = RewardModelOracle(path, max_tokens=10)
    scores = oracle.score(["1234 "] * 2, ["6789", "67890"])
    assert np.isfinite(scores).tolist() == [True, False]
    assert oracle.compare(["1234 "], ["6789"], ["67890"]).is_valid.tolist() == [False]
    unbounded = RewardModelOracle(path, max_tokens=10_000)
    assert np.isnan(unbounded.score(["x" * 128], [""])).all()


def test_the_reward_models_own_template_is_used(tmp_path):
    tokenizer = byte_tokenizer(bos=True, chat=True)
    oracle = RewardModelOracle(save_model(tmp_path / "rm", reward=True, tokenizer=tokenizer), chat_template=True)
    [ids, turns] = oracle.encode(
        ["hi", '[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]'], ["yo", "yo"]
    )
    assert tokenizer.decode(ids) == "<bos><user>hi<assistant>yo"
    assert tokenizer.decode(turns) == "<bos><system>s<user>hi<assistant>yo"
    plain = save_model(tmp_path / "plain", reward=True)
    with pytest.raises(ConfigError, match="no chat template"):
        RewardModelOracle(plain, chat_template=True)


def test_without_a_template_a_conversation_is_read_as_plain_text(tmp_path):
    oracle = RewardModelOracle(save_model(tmp_path / "rm", reward=True))
    alone = json.dumps([{"role": "user", "content": "hi"}])
    turns = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    encoded = oracle.encode([alone, turns, "hi"], ["yo", "yo", "yo"])
    assert [oracle.tokenizer.decode(ids) for ids in encoded] == [
        "hi yo<eos>",
        "System: Be brief.\n\nUser: hi yo<eos>",
        "hi yo<eos>",
    ]


def test_a_template_that_refuses_a_conversation_is_one_line(tmp_path):
    tokenizer = byte_tokenizer(chat=True)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = save_model(tmp_path / "rm", reward=True, tokenizer=tokenizer)
    oracle = RewardModelOracle(path, chat_template=True)
    assert np.isfinite(oracle.score(["hi"], ["yo"])).all()
    turns = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}])
    with pytest.raises(OracleError) as caught:
        oracle.score(["hi", turns], ["yo", "yo"])
    said = str(caught.value)
    assert f"the chat template of the reward model {path} refuses a conversation: no system here; " in said
    assert "oracle.chat_template = false" in said and "\n" not in said


def test_a_template_that_nobody_asked_for_is_told_of_once_and_not_used(tmp_path, caplog):
    chat = save_model(tmp_path / "chat", reward=True, tokenizer=byte_tokenizer(chat=True))
    plain = save_model(tmp_path / "plain", reward=True)
    for path, chat_template in [(chat, True), (chat, False), (plain, None)]:
        build_oracle([path], Config(oracle=OracleConfig(chat_template=chat_template)), device="cpu")
    assert not caplog.messages
    oracle = build_oracle([chat], Config(), device="cpu")
    [said] = caplog.messages
    assert f"the reward model {chat} has a chat template, and reads plain text" in said
    assert "oracle.chat_template = true" in said and "\n" not in said
    assert oracle.tokenizer.decode(oracle.encode(["hi "], ["yo"])[0]) == "hi yo<eos>"


def test_a_model_without_a_reward_head_is_refused_by_its_config_alone(tmp_path):
    path = save_model(tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").unlink()
    for refusal in (check_reward_model, RewardModelOracle):
        with pytest.raises(ConfigError, match="LlamaForCausalLM: it has no classification head") as caught:
            refusal(path)
        assert "\n" not in str(caught.value)
    two = save_model(tmp_path / "two", reward=True, num_labels=2)
    with pytest.raises(ConfigError, match="2 labels"):
        check_reward_model(two)
    with pytest.raises(ConfigError, match="does not exist"):
        check_reward_model(str(tmp_path / "none"))


def test_a_head_that_the_weights_lack_is_refused(tmp_path):
    reward, plain = save_model(tmp_path / "rm", reward=True), save_model(tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").replace(tmp_path / "rm" / "model.safetensors")
    assert plain
    with pytest.raises(ConfigError, match=r"lack score\.weight"):
        RewardModelOracle(reward)


def test_scores_that_are_not_numbers_are_an_oracle_error(tmp_path):
    oracle = RewardModelOracle(save_model(tmp_path / "rm", reward=True))
    oracle.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(OracleError, match="not finite"):
        oracle.score(["p"], ["r"])


def test_build_oracle_loads_what_the_configuration_names(tmp_path):
    path = save_model(tmp_path / "rm", reward=True)
    oracle = build_oracle([path], Config(oracle=OracleConfig(max_tokens=17, batch_tokens=99)), device="cpu")
    assert (oracle.path, oracle.max_tokens, oracle.batch_tokens, oracle.chat_template) == (path, 17, 99, False)
    assert oracle.model.dtype == torch.float32
    halved = Config(oracle=OracleConfig(dtype="bfloat16"))
    assert build_oracle([path], halved, device="cpu").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"oracle\.path"):
        build_oracle([], Config(), device="cpu")


def test_a_model_that_accelerate_places_scores_the_same(tmp_path):
    path = save_model(tmp_path / "model", reward=True)
    whole, placed = (
        RewardModelOracle(path, dtype="float32", device=device).score(["p", "p"], ["one", "another"])
        for device in ("cpu", "auto")
    )
    np.testing.assert_allclose(placed, whole, rtol=1e-6)

"""Tokenizers and networks from scratch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from oatlite.tiny import EOS, PAD, TINY_NAMES, TinyName, TinyShape, new_tiny_model, tiny_config, train_bpe

TEXTS = ["the quick brown fox jumps over the lazy dog", "the slow brown ox"] * 20
TOKENIZER = train_bpe(TEXTS, 300)
SMALL = TinyShape(hidden_size=128, num_layers=2, max_positions=64)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < len(TOKENIZER) for token in ids)


def test_special_tokens_are_apart_and_none_is_added() -> None:
    assert TOKENIZER.eos_token == EOS
    assert TOKENIZER.pad_token == PAD
    assert TOKENIZER.eos_token_id != TOKENIZER.pad_token_id
    assert TOKENIZER.bos_token is None
    assert set(TOKENIZER("the fox")["input_ids"]).isdisjoint(TOKENIZER.all_special_ids)


def test_training_merges_what_is_frequent_and_keeps_within_the_size() -> None:
    assert len(TOKENIZER("the quick")["input_ids"]) < len("the quick")
    assert len(TOKENIZER) <= 300
    assert len(train_bpe(TEXTS, 258)("the")["input_ids"]) == 3
    with pytest.raises(ValueError, match="258"):
        train_bpe(TEXTS, 257)


def test_saved_tokenizer_is_the_same(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded("the lazy fox")["input_ids"] == TOKENIZER("the lazy fox")["input_ids"]
    assert loaded.pad_token_id == TOKENIZER.pad_token_id


@pytest.mark.parametrize("name", TINY_NAMES)
def test_configuration(name: TinyName) -> None:
    config = tiny_config(name, TOKENIZER, SMALL)
    assert config.vocab_size % 64 == 0
    assert len(TOKENIZER) <= config.vocab_size < len(TOKENIZER) + 64
    assert config.hidden_size // config.num_attention_heads == 64
    assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert config.bos_token_id is None


def test_the_default_shape_has_a_few_million_parameters() -> None:
    config = tiny_config("tiny-llama", TOKENIZER)
    config.vocab_size = 4096
    assert 4e6 < new_tiny_model(AutoModelForCausalLM, config).num_parameters() < 6e6


def test_a_hidden_size_that_no_head_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        tiny_config("tiny-llama", TOKENIZER, TinyShape(hidden_size=100))


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_attention_begins_by_looking_for_equal_tokens(name: TinyName, auto_class) -> None:
    """The attention of the first layer, by hand: for each query the equal tokens stand out."""
    torch.manual_seed(0)
    config = tiny_config(name, TOKENIZER, SMALL)
    config._attn_implementation = "eager"
    model = new_tiny_model(auto_class, config)
    tokens = torch.tensor([[10, 20, 30, 40, 20]])
    weights = model(input_ids=tokens, output_attentions=True).attentions[0][0, :, -1]  # (heads, keys)
    others = weights[:, [0, 2, 3]]
    assert bool((weights[:, [1, 4]].mean(0) > 3 * others.max()).all())


@pytest.mark.parametrize("name", TINY_NAMES)
def test_equal_seeds_give_equal_weights(name: TinyName) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(new_tiny_model(AutoModelForCausalLM, tiny_config(name, TOKENIZER, SMALL)))
    first, second, third = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))

"""Encoders as reward models and as what the epistemic head reads: two texts, as their own tokenizers join two."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Tokenizer,
    RobertaConfig,
    RobertaTokenizer,
)

from oatlite.oracles.features import ModelEncoder
from oatlite.oracles.reward_model import RewardModelOracle


def save_encoder(folder: Path, family: str) -> str:
    """A tiny classifier with a tokenizer of its family that knows letters alone, and 40 positions to use."""
    letters = [*string.ascii_lowercase, ":"]
    bert_specials, roberta_specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_labels": 1, "initializer_range": 0.5}
    if family == "bert":
        tokens = [*bert_specials, *letters, *(f"##{letter}" for letter in letters)]
        tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
        config = BertConfig(**sizes, vocab_size=len(tokens), max_position_embeddings=40)
    elif family == "roberta":
        tokens = [*roberta_specials, *sorted(ByteLevel.alphabet())]
        tokenizer = RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
        config = RobertaConfig(**sizes, vocab_size=len(tokens), max_position_embeddings=42, type_vocab_size=1)
    else:
        tokens = [*bert_specials, "[MASK]", "▁", *letters]
        tokenizer = DebertaV2Tokenizer(vocab=[(token, -1.0) for token in tokens], unk_token="[UNK]")
        more = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        config = DebertaV2Config(**sizes, **more, vocab_size=len(tokens), max_position_embeddings=40, type_vocab_size=0)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ENCODERS = {
    "bert": "[CLS] s ##a ##y [SEP] y ##e ##s [SEP]",
    "roberta": "<s> s a y </s> </s> Ġ y e s </s>",  # whose positions begin after that of padding: 42 hold 40 tokens
    "deberta-v2": "[CLS] ▁ s a y [SEP] ▁ y e s [SEP]",
}


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_reads_what_its_tokenizer_makes_of_two_texts(tmp_path: Path, family: str) -> None:
    path = save_encoder(tmp_path / "rm", family)
    oracle, encoder = RewardModelOracle(path), ModelEncoder(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    [ids] = oracle.encode(["say"], [" yes"])
    assert tokenizer.convert_ids_to_tokens(ids) == ENCODERS[family].split()

    longest = "x" * (40 - len(oracle.encode(["say"], [" x"])[0]) + 1)
    responses = [" yes", " longer", "", f" {longest}", f" {longest}x"]
    prompts = ["say"] * len(responses)
    scores = oracle.score(prompts, responses)
    states = [one.features(prompts, responses) for one in (oracle, encoder)]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for i, text in enumerate(responses[:4]):
        inputs = tokenizer(["say"], [text], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True)
        np.testing.assert_allclose(scores[i], expected.logits.item(), atol=1e-5)
        for found in states:
            np.testing.assert_allclose(found[i], expected.hidden_states[-1][0, 0], atol=1e-5)
    assert inputs["input_ids"].shape[1] == oracle.max_tokens == encoder.max_tokens == 40
    assert np.ptp(scores[:4]) > 1e-3
    assert np.isnan(scores[4]) and all(np.isnan(found[4]).all() for found in states)


def test_segments_tell_an_encoder_the_response_from_the_prompt(tmp_path: Path) -> None:
    oracle = RewardModelOracle(save_encoder(tmp_path / "rm", "bert"))
    with torch.no_grad():
        before = oracle.score(["say"], ["yes"])
        oracle.model.bert.embeddings.token_type_embeddings.weight[1, 0] += 1
    assert abs(oracle.score(["say"], ["yes"]) - before) > 1e-3


def test_nothing_to_score_is_no_error(tmp_path: Path) -> None:
    oracle = RewardModelOracle(save_encoder(tmp_path / "rm", "bert"))
    assert oracle.score([], []).shape == (0,) and oracle.features([], []).shape == (0, 16)

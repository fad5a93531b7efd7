"""Which layout of pairs a model gets: the fastest that it computes rightly, and two plain sequences if none."""

import logging

import pytest
import torch
from small_folders import VOCAB_SIZE, config_of
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from oatlite import layout_choice
from oatlite.errors import ConfigError
from oatlite.layout_choice import choose_layout
from oatlite.models import PairModel

CPU = torch.device("cpu")
PAD = 2
FAMILIES = ["llama", "neox"]


def language_model(family, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **changes))


def fake_that_ignores_masks(model):
    """Make a model take a 4-D mask and do as if it were not there."""
    forward = model.base_model.forward

    def ignore(*inputs, attention_mask=None, **named):
        is_shared = attention_mask is not None and attention_mask.ndim == 4
        return forward(*inputs, attention_mask=None if is_shared else attention_mask, **named)

    model.base_model.forward = ignore
    return model


def fake_that_refuses_masks(model):
    """Make a model fail at a 4-D mask, as some hand-written kernels do."""
    forward = model.base_model.forward

    def refuse(*inputs, attention_mask=None, **named):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("expected a mask of two dimensions\nand more")
        return forward(*inputs, attention_mask=attention_mask, **named)

    model.base_model.forward = refuse
    return model


class FakeHead(nn.Linear):
    """An output head after which the model changes the logits."""

    def __init__(self, head, change):
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight = head.weight
        self.change = change

    def forward(self, hidden):
        return self.change(super().forward(hidden))


def layout_of(model, dtype=torch.float32, longest=(40, 20)):
    return choose_layout(PairModel(model.to(dtype)), VOCAB_SIZE, PAD, CPU, longest=longest)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_a_model_that_takes_the_mask_shares_prompts(family, dtype, initializer_range, caplog):
    with caplog.at_level(logging.WARNING, logger=layout_choice.log.name):
        assert layout_of(language_model(family, initializer_range=initializer_range), dtype) == "shared"
    assert caplog.records == []


def test_a_model_whose_attention_cannot_be_replaced_is_given_a_whole_mask():
    model = language_model("llama")
    model.set_attn_implementation("eager")
    assert layout_of(model) == "masked"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_a_model_that_ignores_the_mask_does_not_share_and_the_log_says_so(family, initializer_range, caplog):
    model = fake_that_ignores_masks(language_model(family, initializer_range=initializer_range))
    assert layout_of(model) == "plain"
    (record,) = caplog.records
    assert "log-probabilities differ by" in record.message and type(model).__name__ in record.message


SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
}


def windowed_model(family):
    torch.manual_seed(0)
    if family == "mistral":
        return AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=32))
    kinds = ["sliding_attention", "full_attention"]
    return AutoModelForCausalLM.from_config(
        Qwen2Config(**SMALL, sliding_window=32, use_sliding_window=True, layer_types=kinds)
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_a_window_shares_as_long_as_rows_fit_into_it(family, dtype, caplog):
    model = windowed_model(family)
    assert layout_of(model, dtype, longest=(20, 5)) == "shared"
    assert layout_of(model, dtype, longest=(60, 20)) == "plain"
    assert "log-probabilities differ by" in caplog.records[-1].message


def test_a_model_that_refuses_the_mask_does_not_share_and_the_log_says_why(caplog):
    assert layout_of(fake_that_refuses_masks(language_model("llama"))) == "plain"
    (record,) = caplog.records
    assert "expected a mask of two dimensions" in record.message and "and more" not in record.message


CHANGED_LOGITS = {
    "a sixteenth": lambda logits: logits / 16,
    "three times": lambda logits: logits * 3,
    "capped low": lambda logits: torch.tanh(logits),
    "a tenth more": lambda logits: logits * 1.1,
    "capped high": lambda logits: torch.tanh(logits / 30) * 30,
}


@pytest.mark.parametrize(
    "change",
    list(CHANGED_LOGITS),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_changes_its_logits_is_refused(family, change):
    model = language_model(family)
    model.set_output_embeddings(FakeHead(model.get_output_embeddings(), CHANGED_LOGITS[change]))
    with pytest.raises(ConfigError, match="output head times its last hidden state"):
        layout_of(model)


# --------------------------------------------------------------------------- FlexAttention


@pytest.fixture
def fake_gpu_choice(monkeypatch):
    """The layouts that compete on a GPU compete here, and FlexAttention runs as it is written, without a compiler."""
    monkeypatch.setattr(layout_choice, "rivals", lambda device, **_: [["shared", "flex"], ["masked"]])
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("faster", ["shared", "flex"])
def test_of_two_layouts_that_are_right_the_faster_is_taken(monkeypatch, fake_gpu_choice, family, faster):
    monkeypatch.setattr(layout_choice._Trial, "seconds", lambda self, name: 1.0 if name == faster else 2.0)
    assert layout_of(language_model(family)) == faster


def test_a_layout_that_cannot_run_is_not_timed(monkeypatch, fake_gpu_choice):
    def fail(*_):
        raise RuntimeError("no compiler for this device")

    monkeypatch.setattr("oatlite.layouts.block_mask", fail)
    monkeypatch.setattr(layout_choice._Trial, "seconds", fail)
    assert layout_of(language_model("llama")) == "shared"


def test_the_clock_runs_over_whole_forward_passes(fake_gpu_choice):
    trial = layout_choice._Trial(PairModel(language_model("llama")), VOCAB_SIZE, PAD, CPU, (40, 20))
    with torch.no_grad():
        assert 0 < trial.seconds("shared") < 60


def test_only_a_gpu_compares_and_a_model_without_our_attention_gets_a_whole_mask():
    assert layout_choice.rivals(torch.device("cuda:0"), takes_prompt_masks=True)[0] == ["shared", "flex"]
    assert layout_choice.rivals(CPU, takes_prompt_masks=True)[0] == ["shared"]
    assert layout_choice.rivals(torch.device("cuda:0"), takes_prompt_masks=False) == [["masked"]]

"""Adapters: nothing at first, the base when off, the same policy merged, alone, and read back by peft."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_folders import VOCAB_SIZE, config_of, save_model
from transformers import AutoModelForCausalLM, GPT2Config

from oatlite.errors import ConfigError
from oatlite.lora import (
    PEFT_PREFIX,
    AdapterOptions,
    adapter_off,
    adapter_parameters,
    add_adapter,
    all_parameters,
    merged_parameters,
    targets_of,
    write_adapter,
)
from oatlite.models import load_policy, save_policy

OPTIONS = AdapterOptions(rank=4, alpha=12)
IDS = torch.arange(3, 40).view(1, -1)


def network(family):
    torch.manual_seed(0)
    if family == "gpt2":  # its layers keep their weights the other way round
        config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    else:
        config = config_of(family)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(family, options=OPTIONS, *, seed=0, moved=True):
    model = network(family)
    add_adapter(model, options, seed)
    if moved:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def values(model, published):
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        found = {name: one.value(parameters.__getitem__).clone() for name, one in published.items()}
    assert {name: tuple(value.shape) for name, value in found.items()} == {n: one.shape for n, one in published.items()}
    assert all(source in parameters for one in published.values() for source in one.sources)
    return found


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(family):
    model = adapted(family, moved=False)
    torch.testing.assert_close(logits(model), logits(network(family)), rtol=0, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed_out" in name for name in trained)


def test_its_random_half_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (adapted("llama", seed=seed, moved=False).state_dict() for seed in (1, 1, 2))
    assert not torch.equal(torch.random.get_rng_state(), before), "building the network draws"
    name = next(name for name in one if ".lora_A." in name)
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_merged_weights_are_the_same_policy_under_the_bases_names(family):
    model, plain = adapted(family), network(family)
    published = merged_parameters(model)
    assert {name: one.shape for name, one in published.items()} == {
        name: one.shape for name, one in all_parameters(plain).items()
    }
    before = logits(plain)
    plain.load_state_dict(values(model, published), strict=False)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - before).abs().max() > 0.01, "the adapter must matter for this to show anything"


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_with_the_adapter_off_it_is_the_base_and_afterwards_trains_on(family):
    model = adapted(family)
    on = logits(model)
    with adapter_off(model):
        torch.testing.assert_close(logits(model), logits(network(family)), rtol=0, atol=0)
    torch.testing.assert_close(logits(model), on, rtol=0, atol=0)
    model(input_ids=IDS).logits.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_peft_reads_what_is_written(targets, tmp_path):
    options = AdapterOptions(rank=4, alpha=12, targets=targets)
    model = adapted("llama", options)
    tensors = values(model, adapter_parameters(model))
    assert all(name.startswith(PEFT_PREFIX) for name in tensors)
    if targets:
        assert targets_of(tensors) == sorted(targets)
    write_adapter(tmp_path, tensors, options, base="base")
    again = PeftModel.from_pretrained(network("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_the_merged_policy_is_saved_as_a_plain_one(tmp_path):
    path = save_model(tmp_path / "base")
    model = load_policy(path, torch.float32)
    add_adapter(model, OPTIONS, 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_policy(model, values(model, merged_parameters(model)), path, tmp_path / "merged")
    assert not list(Path(tmp_path / "merged").glob("adapter*"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_adapter_is_added_before_anything_is_rounded():
    model = adapted("llama").to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    parameters = dict(model.named_parameters())
    down, up = (parameters[f"{name}.lora_{side}.default.weight"].double() for side in "AB")
    expected = parameters[f"{name}.base_layer.weight"].double() + 3.0 * (up @ down)
    found = values(model, merged_parameters(model))[f"{name}.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def quantized(tmp_path):
    """A policy in 4 bits with an adapter that has moved. The CPU stands for the GPU that such runs are for; in training
    mode, because outside of it bitsandbytes' CPU kernels repack the weights and round what they multiply."""
    path = save_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    model = load_policy(path, torch.float32, quantized_on=torch.device("cpu"))
    add_adapter(model, OPTIONS, 0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return path, model.train()


def test_a_quantized_base_is_published_as_what_it_computes_with(quantized, tmp_path):
    path, model = quantized
    whole = load_policy(path, torch.float32)
    published = merged_parameters(model)
    assert {name: one.shape for name, one in published.items()} == {
        name: tuple(parameter.shape) for name, parameter in whole.named_parameters()
    }
    found = values(model, published)
    save_policy(model, found, path, tmp_path / "merged")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not hasattr(again.config, "quantization_config") and again.dtype == torch.float32
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-3, atol=1e-3)
    with adapter_off(model):
        assert not torch.allclose(logits(again), logits(model), rtol=1e-2, atol=1e-2)
        assert not torch.allclose(logits(whole.eval()), logits(model), rtol=1e-3, atol=1e-3), "nothing was rounded"


def test_only_the_adapter_of_a_quantized_policy_learns(quantized):
    _, model = quantized
    assert {name.rpartition(".")[0][-14:] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A.default", "lora_B.default"
    }  # fmt: skip
    before = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert model(input_ids=IDS, labels=IDS).loss < loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens"])
def test_a_target_that_cannot_be_is_one_line_with_those_that_can(target, tied):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", tie_word_embeddings=tied))
    with pytest.raises(ConfigError, match=target) as caught:
        add_adapter(
            model, AdapterOptions(rank=4, alpha=8, targets=("q_proj", target) if target != "query" else (target,)), 0
        )
    assert "\n" not in str(caught.value)
    assert "name some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)

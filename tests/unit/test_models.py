"""Policies: the pair forward against one sequence at a time, who may share a prompt, and the folder that is written."""

import json

import numpy as np
import pytest
import torch
from small_folders import VOCAB_SIZE, byte_tokenizer, config_of, save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from oatlite import models
from oatlite.errors import ConfigError
from oatlite.layouts import TokenPair, lay_out
from oatlite.models import PairModel, checkpoint_gradients, load_policy, save_policy

CPU = torch.device("cpu")
PAD = 2
FAMILIES = ["llama", "neox"]
LAYOUTS = ["shared", "masked", "plain"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # Llama normalizes in float32 even then


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def language_model(family, dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(family, **changes)).to(dtype)


def random_pairs(sizes, seed=0):
    """Pairs of (prompt, chosen, rejected) lengths. The pad token is among their tokens."""
    generator = np.random.default_rng(seed)
    pairs = [token_pair(generator, size) for size in sizes]
    pairs[0].prompt[-1] = pairs[-1].rejected[0] = PAD
    return pairs


def token_pair(generator, sizes):
    prompt, chosen, rejected = (generator.integers(0, VOCAB_SIZE, size).astype(np.int32) for size in sizes)
    return TokenPair(prompt=prompt, chosen=chosen, rejected=rejected)


RAGGED = [(7, 3, 5), (1, 1, 1), (2, 6, 1), (12, 1, 4), (3, 4, 4)]
LONG = [(9, 3, 5), (6, 1, 2), (7, 4, 4)]  # every row begins with six positions that need no mask


def one_by_one(model, pairs):
    """The log-probability of every response token, each response alone through the model's own forward."""
    logprobs = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response]).astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0]
            predicted = logits[len(pair.prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(predicted.gather(1, ids[len(pair.prompt) :, None])[:, 0])
    return torch.cat(logprobs)


def logprobs_and_gradients(model, logprobs):
    """The values, and the gradient of their weighted sum for every parameter, by name."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


def assert_close(actual, expected, tolerance):
    values, gradients = actual
    expected_values, expected_gradients = expected
    torch.testing.assert_close(values, expected_values, atol=tolerance, rtol=tolerance)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        scale = max(1.0, float(expected_gradients[name].abs().max()))
        assert float((gradient - expected_gradients[name]).abs().max()) <= tolerance * scale, name


# --------------------------------------------------------------------------- the pair forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [RAGGED, LONG], ids=["ragged", "long"])
def test_a_batch_gives_the_logprobs_and_gradients_of_one_response_at_a_time(family, dtype, layout, sizes):
    model, pairs = language_model(family, dtype), random_pairs(sizes)
    expected = logprobs_and_gradients(model, one_by_one(model, pairs))
    actual = logprobs_and_gradients(model, PairModel(model)(lay_out(pairs, layout, PAD, CPU)))
    assert actual[0].dtype == dtype
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_share_keys_see_what_they_should(layout):
    model, pairs = language_model("llama", torch.float64, num_key_value_heads=1), random_pairs(LONG)
    expected = logprobs_and_gradients(model, one_by_one(model, pairs))
    assert_close(logprobs_and_gradients(model, PairModel(model)(lay_out(pairs, layout, PAD, CPU))), expected, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, layout):
    model, pairs = language_model("llama", torch.float64), random_pairs(RAGGED)
    batch = lay_out(pairs, layout, PAD, CPU)
    expected = logprobs_and_gradients(model, PairModel(model)(batch))
    monkeypatch.setattr(models, "LOGITS_CHUNK_TOKENS", 3)
    assert_close(logprobs_and_gradients(model, PairModel(model)(batch)), expected, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_head_with_a_bias_keeps_it(layout):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **sizes)).double()
    model.eval()
    nn.init.normal_(model.lm_head.bias)
    pairs = random_pairs(RAGGED)
    expected = logprobs_and_gradients(model, one_by_one(model, pairs))
    assert_close(logprobs_and_gradients(model, PairModel(model)(lay_out(pairs, layout, PAD, CPU))), expected, 1e-12)


def test_neither_response_sees_the_other_where_they_share_a_prompt():
    model = PairModel(language_model("llama", torch.float64))
    pair = random_pairs([(5, 4, 6)])[0]
    other = TokenPair(prompt=pair.prompt, chosen=(pair.chosen + 1) % VOCAB_SIZE, rejected=pair.rejected)
    batches = [lay_out([each], "shared", PAD, CPU) for each in (pair, other)]
    with torch.no_grad():
        before, after = (model(batch) for batch in batches)
    rejected = batches[0].segments == 1
    assert torch.equal(before[rejected], after[rejected])
    assert not torch.allclose(before[~rejected], after[~rejected])


def test_padding_and_neighbours_change_nothing():
    model = PairModel(language_model("neox", torch.float64))
    pairs = random_pairs(RAGGED)
    with torch.no_grad():
        for layout in LAYOUTS:
            together = model(lay_out(pairs, layout, PAD, CPU))
            alone = torch.cat([model(lay_out([pair], layout, PAD + 1, CPU)) for pair in pairs])
            torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_says_which_token_belongs_to_which_response(layout):
    pairs = random_pairs(RAGGED)
    batch = lay_out(pairs, layout, PAD, CPU)
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    assert batch.num_pairs == len(pairs)
    assert batch.input_ids.shape[0] == (len(responses) if layout == "plain" else len(pairs))
    assert batch.segments.tolist() == [i for i, response in enumerate(responses) for _ in response]
    assert batch.targets.tolist() == np.concatenate(responses).tolist()


def test_a_response_without_a_token_has_no_logprobs():
    model = PairModel(language_model("llama", torch.float64))
    generator = np.random.default_rng(0)
    whole, cut_short = token_pair(generator, (4, 3, 2)), token_pair(generator, (4, 3, 0))
    for layout in LAYOUTS:
        batch = lay_out([cut_short, whole], layout, PAD, CPU)
        assert batch.segments.tolist() == [0, 0, 0, 2, 2, 2, 3, 3]
        with torch.no_grad():
            torch.testing.assert_close(
                model(batch), one_by_one(model.model, [whole, cut_short])[[5, 6, 7, 0, 1, 2, 3, 4]]
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_gradients_are_the_same_and_every_layer_runs_twice(family):
    model, pairs = language_model(family), random_pairs(RAGGED)
    batch = lay_out(pairs, "shared", PAD, CPU)
    expected = logprobs_and_gradients(model, PairModel(model)(batch))
    calls = []
    first_mlp = model.base_model.layers[0].mlp
    first_mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_gradients(model)
    assert_close(logprobs_and_gradients(model, PairModel(model)(batch)), expected, 1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [RAGGED, LONG], ids=["ragged", "long"])
def test_a_mask_by_blocks_gives_the_same(family, sizes):
    """FlexAttention has no backward pass on a CPU, and is not compiled here: what is shown is the mask."""
    model, pairs = language_model(family, torch.float64), random_pairs(sizes)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        actual = PairModel(model)(lay_out(pairs, "flex", PAD, CPU))
        torch.testing.assert_close(actual, one_by_one(model, pairs), atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------- folders


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    dropout = {"attention_dropout": 0.5} | ({"hidden_dropout": 0.5} if request.param == "neox" else {})
    return save_model(tmp_path / "first", request.param, **dropout)


def greedy_logits(model):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_loaded_policy_has_no_dropout_even_in_training(folder):
    policy = load_policy(folder, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(greedy_logits(policy.train()), greedy_logits(expected))
    assert not torch.equal(greedy_logits(AutoModelForCausalLM.from_pretrained(folder).train()), greedy_logits(expected))
    assert policy.config.use_cache is False
    assert load_policy(folder, torch.bfloat16).dtype == torch.bfloat16


def test_what_is_saved_is_what_is_loaded(folder, tmp_path):
    policy = load_policy(folder, torch.float32)
    trained = {name: value + 0.125 for name, value in policy.state_dict().items()}
    save_policy(policy, trained, folder, tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert set(again.state_dict()) == set(trained)
    for name, value in again.state_dict().items():
        assert torch.equal(value, trained[name]), name
    text = "Grüße, 42!"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "second")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].eos_token_id == tokenizers[1].eos_token_id
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert json.loads((tmp_path / "second" / "config.json").read_text()).get("use_cache", True) is True


def test_a_policy_with_tied_embeddings_survives(tmp_path):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    policy = load_policy(folder, torch.float32)
    names = [name for name, _ in policy.named_parameters()]
    assert "lm_head.weight" not in names
    trained = {name: value.detach() + 0.125 for name, value in policy.named_parameters()}
    save_policy(policy, trained, folder, tmp_path / "second")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.125
    assert torch.equal(greedy_logits(load_policy(str(tmp_path / "second"), torch.float32)), greedy_logits(policy))


@pytest.mark.parametrize("spoil", ["absent", "no weights", "not JSON", "unknown type"])
def test_a_folder_that_cannot_be_loaded_is_one_line_that_names_it(tmp_path, spoil):
    folder = tmp_path / "model"
    if spoil != "absent":
        save_model(folder)
    if spoil == "no weights":
        (folder / "model.safetensors").unlink()
    elif spoil == "not JSON":
        (folder / "config.json").write_text("{")
    elif spoil == "unknown type":
        (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match="cannot load the model") as caught:
        load_policy(str(folder), torch.float32)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_a_models_folder_does_not_run_unless_it_is_trusted(tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nraise ValueError('it ran')\n")
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_policy(str(folder), torch.float32)
    assert not ran.exists()
    with pytest.raises(ConfigError, match="it ran"):
        load_policy(str(folder), torch.float32, trust_remote_code=True)
    assert ran.exists()

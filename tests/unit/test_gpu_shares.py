"""What a run takes of each GPU, from a configuration and model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_folders import save_model

from oatlite.config.load import load_config, resolve
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.gpu_shares import MIXING_BYTES, NEED_NO_REFERENCE, cards, engine_shares, report
from oatlite.memory import GIB
from oatlite.model_size import size_from, size_of

ONE_BILLION = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LONGEST = (512, 53)
ONE_PAIR = {"learner__micro_batch_size": 1}


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """The configuration of a model of 1.24 billion parameters, without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_BILLION))
    return str(tmp_path)


def resolved(policy: str, num_gpus: int, **changes: Any) -> Config:
    flags = {"model.path": policy, "placement.gpus": num_gpus, "oracle.path": "remote", "remote.url": "http://h:1"}
    flags |= {key.replace("__", "."): value for key, value in changes.items()}
    if flags["oracle.path"] != "remote":
        flags.pop("remote.url")
    return resolve(load_config(preset="tldr", flags=flags, num_gpus=num_gpus), num_gpus)


# Sizes


@pytest.mark.parametrize("family", ["llama", "neox", "moe"])
def test_the_size_of_a_folder(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path, family, tie_word_embeddings=family == "llama")
    size = size_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert size is not None and size.num_parameters == model.num_parameters()
    assert (size.num_layers, size.hidden_size, size.num_heads, size.num_kv_heads, size.head_size) == (2, 16, 2, 2, 8)
    assert size.ffn_size == 32
    counted = size_from(json.loads((tmp_path / "config.json").read_text()))
    assert counted.num_parameters == pytest.approx(size.num_parameters, rel=0.07), "but norms, biases and routers"


def test_a_size_without_weights_is_counted_from_the_shape(policy: str) -> None:
    size = size_of(policy)
    # 128,256 x 2,048 tied, and 16 layers of attention 2 x 2,048 x 2,048 + 2 x 2,048 x 512 and 3 x 2,048 x 8,192.
    assert size is not None and size.num_parameters == 262_668_288 + 16 * (8_388_608 + 2_097_152 + 50_331_648)


def test_what_is_not_here_or_broken_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert size_of("owner/name") is None
    snapshot = tmp_path / "hub/hub/models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(ONE_BILLION))
    assert size_of("owner/name") is not None
    for broken in (b"", b"\xff" * 20, b"\x04" + b"\0" * 7 + b"null"):
        (snapshot / "model.safetensors").write_bytes(broken)
        assert size_of("owner/name") is None
    (snapshot / "model.safetensors").unlink()
    (snapshot / "config.json").write_text('{"hidden_size": 8}')
    assert size_of("owner/name") is None


# Shares


def test_a_share_goes_to_vllm_and_leaves_room_for_the_learner(policy: str) -> None:
    config = resolved(policy, 1)
    (card,) = cards(config, [80 * GIB], LONGEST)
    assert card.division is not None and card.division.free > 0
    shares = engine_shares(config, [80 * GIB], LONGEST)
    # Weights 2.3, a cache of 256 sequences of 581 tokens at 32 KiB each, 4.5, and work 2.2.
    assert shares == {"actor 0": pytest.approx(9.1 / 80, abs=0.001)}
    assert set(card.division.learner) >= {"weights", "optimizer", "weight buffer"}


def test_gpus_of_their_own(policy: str) -> None:
    config = resolved(policy, 2, placement__actors=1, placement__learners=1)
    assert config.placement.sleep is False
    learner, actor = cards(config, [80 * GIB] * 2, LONGEST)
    assert learner.division is not None and not learner.actors and learner.division.learner["weight buffer"] == 0
    assert actor.division is not None and not actor.division.learner
    assert engine_shares(config, [80 * GIB] * 2, LONGEST) == {"actor 0": 0.887}  # nine tenths less a context


def test_a_given_share_wins(policy: str) -> None:
    config = resolved(policy, 1, placement__gpu_memory_utilization=0.6)
    for totals in ([80 * GIB], [8 * GIB], [0], []):
        assert engine_shares(config, totals, LONGEST) == {"actor 0": 0.6}
    assert "vLLM 48.0 GiB" in next(report(config, [80 * GIB], LONGEST))


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({}, "--micro-batch-size 4"),
        (ONE_PAIR, "learner.optimizer_offload=true"),
        (ONE_PAIR | {"learner__optimizer_offload": True}, "learner.gradient_checkpointing=true"),
        (
            ONE_PAIR | {"learner__optimizer_offload": True, "learner__gradient_checkpointing": True},
            "a smaller --model",
        ),
        (ONE_PAIR | {"learner__zero_stage": 0}, "--lora-rank 16"),
    ],
)
def test_what_does_not_fit_is_refused(policy: str, changes: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_shares(resolved(policy, 1, **changes), [6 * GIB], LONGEST)
    text = str(caught.value)
    assert "GPU 0 has 6.0 GiB" in text and fix in text and "\n" not in text
    assert "placement.gpu_memory_utilization=0.35" in text


def test_what_is_not_known_is_refused_by_name(policy: str) -> None:
    with pytest.raises(ConfigError, match="its memory is not known"):
        engine_shares(resolved(policy, 1), [0], LONGEST)
    with pytest.raises(ConfigError, match="the size of owner/none is not known"):
        engine_shares(resolved("owner/none", 1), [GIB], LONGEST)


def test_models_beside_vllm_and_the_reference_count(policy: str, tmp_path: Path) -> None:
    def division(**changes: Any) -> Any:
        (card,) = cards(resolved(policy, 1, **changes), [80 * GIB], LONGEST)
        return card.division

    weights = 2 * 1_235_747_840 - 2 * 65_536  # of the folder's model
    plain = division()
    assert plain.beside == GIB and plain.learner["reference"] == 0
    judged = division(oracle__path=policy)
    assert judged.beside > GIB + 2 * 1_235_000_000
    assert division(algorithm__name="dpo").learner["reference"] == plain.learner["weights"] > weights - GIB
    assert division(algorithm__name="dpo", lora__rank=8).learner["reference"] == 0, "the adapter's own base"
    mixed = division(rollout__sampler="mixture", algorithm__name="dpo")
    assert mixed.beside == GIB + plain.learner["weights"] + MIXING_BYTES
    adapter = division(lora__rank=8, lora__sync="adapter")
    assert adapter.learner["weight buffer"] < plain.learner["weight buffer"]


def test_the_constants_of_other_modules_are_met() -> None:
    from oatlite.algorithms import ALGORITHMS
    from oatlite.engine.mixing import REFERENCE_CACHE_BYTES
    from oatlite.memory import LOGITS_CHUNK
    from oatlite.models import LOGITS_CHUNK_TOKENS

    without = {name for name, algorithm in ALGORITHMS.items() if not algorithm.needs.reference}
    assert without == set(NEED_NO_REFERENCE)
    assert MIXING_BYTES >= REFERENCE_CACHE_BYTES + GIB
    assert LOGITS_CHUNK == LOGITS_CHUNK_TOKENS


# Lines


def test_the_lines_say_what_each_gpu_holds(policy: str) -> None:
    config = resolved(policy, 1)
    line, sleeping = report(config, [80 * GIB], LONGEST)
    for words in ("GPU 0 (80.0 GiB): vLLM 9.1 GiB (weights 2.3, cache 4.5, work 2.2)", "optimizer 13.8", "free 3"):
        assert words in line
    assert sleeping.strip() == "vLLM gives up 8.1 GiB while the learner learns"
    (missing, _) = report(config, [], LONGEST)
    assert missing.startswith("GPU 0 (missing): vLLM 9.1 GiB") and missing.endswith("GiB") and "needs 4" in missing
    assert len(list(report(resolved(policy, 1, placement__sleep=False), [80 * GIB], LONGEST))) == 1
    (unknown,) = report(resolved("owner/none", 1), [80 * GIB], LONGEST)
    assert unknown == "GPU 0 (80.0 GiB): not known without the size of owner/none"
    two = list(report(resolved(policy, 1, placement__actors=2), [80 * GIB], LONGEST))
    assert "vLLM 2 x " in two[0]

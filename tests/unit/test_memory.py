"""The arithmetic of a GPU's memory, against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

from oatlite.memory import (
    GIB,
    ActorShape,
    LearnerShape,
    activations,
    adapter_parameters,
    divide,
    passing,
    resident,
    reward_model,
    sampler,
)
from oatlite.model_size import ModelSize

SMALL = ModelSize(
    num_parameters=10_000,
    num_layers=2,
    hidden_size=10,
    ffn_size=40,
    num_heads=2,
    num_kv_heads=1,
    head_size=5,
    vocab_size=100,
)
LEARNER = LearnerShape(
    policy=SMALL,
    weight_bytes=2,
    num_trained=10_000,
    zero_stage=2,
    ranks=2,
    num_rows=2,
    row_tokens=30,
    buffer_bytes=7,
    reference=SMALL,
)
ACTOR = ActorShape(model=SMALL, weight_bytes=2, num_sequences=300, sequence_tokens=30)
WIDE = replace(SMALL, head_size=20_000)  # 2 sides x 2 layers x 20,000 numbers a token in the cache


def test_what_a_learner_holds() -> None:
    held = {"weights": 20_000, "gradients": 20_000, "optimizer": 60_000, "reference": 20_000}
    assert resident(LEARNER) == held | {"weight buffer": 7, "context": GIB}
    alone = resident(replace(LEARNER, ranks=1))
    assert (alone["gradients"], alone["optimizer"]) == (40_000, 120_000)
    first = resident(replace(LEARNER, zero_stage=1))
    assert (first["gradients"], first["optimizer"]) == (40_000, 60_000)
    third = resident(replace(LEARNER, zero_stage=3))
    assert (third["weights"], third["gradients"], third["optimizer"]) == (10_000, 20_000, 60_000)
    plain = resident(replace(LEARNER, zero_stage=0, weight_bytes=4))
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (40_000, 40_000, 80_000)


def test_what_offloading_takes_away() -> None:
    offloaded = resident(replace(LEARNER, is_optimizer_offloaded=True, is_reference_offloaded=True))
    assert [offloaded[part] for part in ("weights", "gradients", "optimizer", "reference")] == [20_000, 0, 0, 0]
    assert resident(replace(LEARNER, zero_stage=3, are_parameters_offloaded=True))["weights"] == 0
    assert resident(replace(LEARNER, reference=None))["reference"] == 0


def test_what_an_adapter_trains() -> None:
    # Of each layer: queries and output 2 (10 + 10), keys and values 2 (10 + 5), the feed-forward's three 3 (10 + 40).
    assert adapter_parameters(SMALL, 4) == 2 * 4 * (40 + 30 + 150)
    adapted = replace(LEARNER, num_trained=1_760)
    held = resident(adapted)
    assert (held["weights"], held["gradients"], held["optimizer"]) == (20_000 + 3_520, 3_520, 10_560)
    # In 4 bits: 2,000 numbers of embedding and head stay, 8,000 take 0.55 bytes each.
    assert resident(replace(adapted, is_quantized=True))["weights"] == 4_000 + 4_400 + 3_520
    assert activations(adapted) == activations(LEARNER) - 4 * 100 * 10, "no gradient of the head"


def test_activations_of_a_micro_batch() -> None:
    # A token and layer: 2 (12 x 10 + 4 x 20 + 4 x 40) = 720. 60 tokens of 2 layers, and 6 x 30 each for the mask;
    # chunks of logits 3 x 512 x 4 x 100 = 614,400, and the head's gradient 4,000.
    assert activations(LEARNER) == 60 * (1_440 + 180) + 614_400 + 4_000
    # Computed again: 2 x 10 for each layer, and one layer's 720.
    assert activations(replace(LEARNER, recomputes_activations=True)) == 60 * (760 + 180) + 618_400


def test_the_largest_moment_of_learning() -> None:
    backward = 715_600
    assert passing(replace(LEARNER, zero_stage=0)) == backward
    reduced = backward + 1_000_000_000 + 40_000
    assert passing(LEARNER) == reduced, "ZeRO's buffer is of a fixed length"
    assert passing(replace(LEARNER, zero_stage=3)) == reduced + 20_000, "and weights that are whole at a time"
    many = replace(LEARNER, num_trained=2 * 10**9)
    assert passing(many) == 8 * 10**9, "the optimizer's step, half of it on each rank"
    assert passing(replace(many, is_optimizer_offloaded=True)) == 711_600 + 3_000_000_000
    large = replace(SMALL, num_parameters=10**9)
    assert passing(replace(LEARNER, reference=large, is_reference_offloaded=True)) == 2 * 10**9


def test_what_a_sampler_wants() -> None:
    # Work: 8,192 x 2 (8 x 10 + 4 x 40) = 3,932,160; logits 16 x 256 x 100 = 409,600; a gigabyte of graphs.
    wanted = {"weights": 20_000, "cache": GIB, "work": 3_932_160 + 409_600 + GIB}
    assert sampler(ACTOR) == wanted, "and a cache of a gigabyte at least"
    # 256 sequences at once of 30 + 16 tokens, of 2 x 80,000 bytes each.
    assert sampler(replace(ACTOR, model=WIDE))["cache"] == 256 * 46 * 160_000
    assert sampler(replace(ACTOR, model=WIDE, num_sequences=200))["cache"] == 200 * 46 * 160_000
    assert sampler(replace(ACTOR, sequence_tokens=10_000))["work"] == 10_000 * 480 + 409_600 + GIB
    assert reward_model(SMALL, 2, 100) == 2 * (10_000 + 100 * 240)


def test_a_sampler_that_is_cut_up() -> None:
    cut = replace(ACTOR, model=replace(WIDE, num_kv_heads=2), num_gpus=4)
    # Weights by four, the feed-forward too: 8,192 x 2 (80 + 160 / 4); of two heads' keys each GPU has one, twice over.
    found = sampler(cut)
    assert found["weights"] == 5_000
    assert found["work"] == 8_192 * 2 * (80 + 40) + 409_600 + GIB
    assert found["cache"] == sampler(replace(ACTOR, model=WIDE))["cache"]


def test_side_by_side() -> None:
    found = divide(10 * GIB, ACTOR, 1, LEARNER)
    assert found.engine == sampler(ACTOR)
    engine, learner = 20_000 + 3_932_160 + 409_600 + 2 * GIB, 120_007 + GIB
    assert (found.engine_bytes, sum(found.learner.values())) == (engine, learner)
    assert found.most == engine + GIB + learner + passing(LEARNER)
    assert found.free == 10 * GIB - found.most
    assert divide(None, ACTOR, 1, LEARNER).most == found.most


def test_in_turns() -> None:
    """Asleep, an engine keeps its graphs and its context."""
    found = divide(10 * GIB, replace(ACTOR, sleeps=True), 1, LEARNER)
    learner = 120_007 + GIB
    awake, asleep = found.engine_bytes + GIB, 2 * GIB + passing(LEARNER)
    assert awake > asleep and found.most == learner + awake
    large = replace(LEARNER, num_trained=2 * 10**9)
    assert divide(None, replace(ACTOR, sleeps=True), 1, large).most == (
        sum(resident(large).values()) + 2 * GIB + 8 * 10**9
    )


def test_a_cache_gets_what_is_left() -> None:
    actor = replace(ACTOR, model=WIDE)
    wanted = sampler(actor)
    found = divide(11 * GIB // 2, actor, 1, LEARNER)
    assert GIB < found.engine["cache"] < wanted["cache"]
    assert found.free == 0
    too_small = divide(4 * GIB, actor, 1, LEARNER)
    assert too_small.engine["cache"] == GIB and too_small.free < 0
    both = divide(20 * GIB, actor, 2, LEARNER)
    assert both.most == 2 * (both.engine_bytes + GIB) + 120_007 + GIB + passing(LEARNER)


def test_a_gpu_of_its_own() -> None:
    found = divide(100 * GIB, replace(ACTOR, beside_bytes=3 * GIB), 1, None)
    assert found.engine_bytes + 4 * GIB == 90 * GIB, "nine tenths less a reward model and a context"
    two = divide(100 * GIB, ACTOR, 2, None)
    assert two.engine_bytes + GIB == 45 * GIB
    learner = divide(10 * GIB, None, 0, LEARNER)
    assert learner.most == 120_007 + GIB + passing(LEARNER) and not learner.engine

"""Merging, checking, resolving and repeating a configuration."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from oatlite.config.dump import toml_value
from oatlite.config.flags import FLAGS
from oatlite.config.load import dump_toml, load_config, num_steps, preset_names, resolve
from oatlite.config.oracle_names import for_evaluation
from oatlite.config.placement import actors_of_rank, is_shared, places, starts_after
from oatlite.config.schema import Config
from oatlite.config.steps import gradient_steps, pairs_of_step, prompts_within, queries_of_step, queries_until
from oatlite.errors import ConfigError
from oatlite.hardware import Gpu, visible


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def resolved(num_gpus: int = 0, **given: Any) -> Config:
    return resolve(load_config(num_gpus=num_gpus, **given), num_gpus)


OFFLINE = {"rollout.offline": True, "data.preferences": "some/pairs", "model.path": "some/model"}


def refused(num_gpus: int = 0, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(num_gpus, **given)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def toml(text: str) -> Path:
    path = Path("given.toml")
    path.write_text(text)
    return path


# Layers


def test_every_shipped_preset_loads() -> None:
    assert preset_names() == [
        *(
            "demo",
            "gshf",
            "mixp",
            "online",
            "ref",
            "tldr",
            "tldr-apl",
            "tldr-dpo-judge",
            "tldr-dpo-remote",
            "tldr-dpo-remote-6.9b",
            "tldr-dpo-sea",
        ),
        *("tldr-ee4llm", "tldr-offline", "tldr-sea", "tldr-xpo"),
    ]
    for name in preset_names():
        planned = resolved(8, preset=name)
        expected = {"tldr-ee4llm": 0} | dict.fromkeys(("gshf", "mixp", "online", "ref"), 48)
        assert gradient_steps(planned, 1) == expected.get(name, 1), name
    judged = resolved(8, preset="tldr-dpo-judge")
    assert judged.data.max_prompts == 50000, "what it does not change is its base's"
    assert judged.judge.template == "summaries", "its prompts are posts"
    assert resolved(8, preset="tldr-sea").algorithm.name == "simpo"
    assert num_steps(resolved(8, preset="tldr-apl")) == 4 * (100000 // 1024), "128 queries each"
    assert num_steps(resolved(preset="demo")) == 1536 // 64
    assert num_steps(resolved(2, preset="tldr")) == 50000 // 128


REMOTE = {"data.max_prompts": 50000, "rollout.prompts_per_step": 128, "learner.batch_size": 128} | {
    "sampling.max_new_tokens": 53,
    "sampling.temperature": 0.7,
    "learner.micro_batch_size": 8,
    "learner.lr": 5e-7,
    "rollout.sync_every": 1,
    "eval.every": 20,
    "eval.prompts": 1000,
    "model.path": "trl-lib/pythia-1b-deduped-tldr-sft",
    "data.reference_key": "pythia-1b-reference",
}
DPO_REMOTE = REMOTE | {"algorithm.name": "dpo", "algorithm.beta": 0.1, "placement.gpus": 8, "oracle.path": ("remote",)}
SIMPO = REMOTE | {"algorithm.name": "simpo", "algorithm.beta": 2.0, "placement.gpus": 2}
PAIRRM = "llm-blender/PairRM-hf"
SEA = {"explore.rule": "sea-bai", "explore.uncertainty": "logits", "explore.random_fallback": False}
SAMPLERS = {"learner.weight_decay": 0.0, "learner.adam_betas": (0.9, 0.999), "learner.lr": 5e-7, "learner.passes": 2}


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("tldr", SIMPO),
        ("tldr-offline", SIMPO | {"rollout.sync_every": 100000}),
        (
            "tldr-sea",
            SIMPO
            | SEA
            | {"placement.gpus": 4, "placement.actors": 4, "placement.learners": 4, "learner.micro_batch_size": 1}
            | {"explore.num_candidates": 10, "explore.encoder": None},
        ),
        ("tldr-dpo-remote", DPO_REMOTE),
        ("tldr-dpo-judge", DPO_REMOTE | {"oracle.path": ("judge",), "judge.model": "gpt-4o-mini-2024-07-18"}),
        (
            "tldr-dpo-remote-6.9b",
            DPO_REMOTE
            | {"model.path": "trl-lib/pythia-6.9b-deduped-tldr-sft", "data.reference_key": "pythia-6.9b-reference"}
            | {"remote.url": "http://remote-rm"},
        ),
        (
            "tldr-dpo-sea",
            DPO_REMOTE
            | SEA
            | {"data.epochs": 2, "data.max_queries": 50000, "learner.warmup_ratio": 0.02, "eval.every_queries": 2560}
            | {"explore.num_candidates": 20, "explore.self_label_ratio": 0.3, "explore.burn_in": 5}
            | {"explore.encoder": PAIRRM},
        ),
        (
            "tldr-ee4llm",
            DPO_REMOTE
            | {"explore.rule": "sea-ee", "explore.num_candidates": 20, "explore.head_only": True, "eval.online": True}
            | {
                "explore.encoder": PAIRRM,
                "explore.random_fallback": True,
                "eval.best_of_n": 10,
                "eval.best_of_n_temperature": 0.7,
            },
        ),
        (
            "tldr-apl",
            DPO_REMOTE
            | {"data.max_prompts": 100000, "data.epochs": 4, "rollout.prompts_per_step": 1024}
            | {"explore.rule": "apl", "explore.num_candidates": 2, "explore.entropy_share": 1.0}
            | {"explore.certainty_share": 0.125},
        ),
        ("tldr-xpo", DPO_REMOTE | {"algorithm.name": "xpo", "algorithm.alpha": 5e-6}),
        *((name, SAMPLERS | {"rollout.policy_share": 0.0}) for name in ("ref", "online", "gshf")),
        ("mixp", SAMPLERS | {"rollout.policy_share": 0.3, "sampling.mixture_weight": 0.5}),
    ],
)
def test_a_preset_sets_what_the_command_that_it_stands_for_sets(preset: str, values: dict[str, Any]) -> None:
    config = resolved(8, preset=preset)
    found = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in values}
    assert found == values


OAT_FLAGS = (
    *("apl-pref-certainty-only", "best-of-n-eval", "beta", "collocate", "cuda-devices", "dap-algo"),
    *("eval-query-interval", "eval-steps", "exp-method", "exp-rnd-sample", "flash-attn", "generate-max-length", "gpus"),
    *("gradient-checkpointing", "input-key", "learn-rm", "learn-rm-only", "lr-warmup-ratio", "max-model-data-ratio"),
    *("max-step-adjustment", "max-train", "model-rollout", "num-bon", "num-prompt-epoch", "num-samples"),
    *("online-evaluation", "output-key", "pi-buffer-maxlen-per-device", "preference-oracle", "pretrain"),
    *("prompt-data", "remote-rm-url", "reward-oracle", "rnd-seed", "rollout-batch-size"),
    *("rollout-batch-size-per-device", "sync-params-every", "train-batch-size", "train-batch-size-per-device"),
    *("use-wb", "wb-run-name", "vllm-sleep", "vllm-gpu-ratio"),
)
"""Those of the commands that the presets stand for, and those that place them on GPUs."""


def test_every_flag_of_oats_commands_has_a_row_in_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|")[1] for line in text.partition("## Coming from oat")[2].splitlines() if line[:1] == "|"]
    told = {flag for row in rows for flag in re.findall(r"`--([a-z0-9-]+)`", row)}
    assert not set(OAT_FLAGS) - told
    assert all(rule in text for rule in ("`EnnBAITS`", "`EnnEETS`", "`EnnUncertainty`", "`EnnPassive`"))


def test_pairs_that_the_head_labels_itself_make_a_budget_last_longer() -> None:
    """128 prompts on four ranks are 32 each, of which 9 (0.3 of 32, rounded down) ask nobody after five steps."""
    planned = resolved(8, preset="tldr-dpo-sea")
    assert [queries_of_step(planned, step) for step in (1, 5, 6, 542)] == [128, 128, 92, 92]
    assert num_steps(planned) == 5 + 537, "537 steps of 92 for 50,000 - 5 * 128 = 49,360 queries"
    assert queries_until(planned, 541) == 5 * 128 + 536 * 92 < 50000 <= queries_until(planned, 542)
    assert sum(gradient_steps(planned, step) for step in range(1, 543)) == 542 and pairs_of_step(planned) == 128
    assert prompts_within(planned, 48, 542) == 68, "four ranks with 17, of which 5 ask nobody"
    assert prompts_within(planned, 48, 5) == 48 and prompts_within(planned, 0, 542) == 1
    for sets, count in ((["data.max_queries=600"], 5), (["data.max_queries=641"], 6), (["explore.burn_in=0"], 544)):
        assert num_steps(resolved(8, preset="tldr-dpo-sea", sets=sets)) == count, sets
    alone = resolved(8, preset="tldr-dpo-sea", sets=["explore.self_label_ratio=1", "explore.burn_in=2"])
    assert num_steps(alone) == 2 * (50000 // 128), "it never asks about 50,000, and the prompts bound it"


def test_the_presets_of_the_samplers_differ_in_the_sampler() -> None:
    presets = {name: resolved(4, preset=name) for name in ("ref", "online", "gshf", "mixp")}
    samplers = {name: config.rollout.sampler for name, config in presets.items()}
    assert samplers == {"ref": "reference", "online": "policy", "gshf": "hybrid", "mixp": "mixture"}
    online = presets["online"]
    for config in presets.values():
        same = config.rollout.model_copy(update={"sampler": "policy", "policy_share": 0.0})
        assert config.model_copy(update={"rollout": same, "run": online.run}) == online
    steps_of_iteration = online.rollout.sync_every
    assert num_steps(online) == 3 * steps_of_iteration
    assert sum(gradient_steps(online, step) for step in range(1, 1 + steps_of_iteration)) == 1200


@pytest.mark.parametrize(
    ("rule", "setting", "words"),
    [
        ("apl", "explore.members=5", "this is apl; leave it out"),
        ("sea-ee", "explore.entropy_share=0.2", "is for --explore apl, and this is sea-ee"),
        ("sea-bai", "explore.max_tries=2", "is for --explore sea-ee, and this is sea-bai"),
        ("passive", "explore.uncertainty=logits", "is for --explore sea-bai or uncertainty, and this is passive"),
        ("none", "rollout.policy_share=0.3", "is for --sampler reference, hybrid or mixture, and this is policy"),
        ("none", "sampling.mixture_weight=0.3", "is for --sampler mixture, and this is policy"),
        ("sea-bai", "explore.burn_in=3", "add --set explore.self_label_ratio=0.3, or leave it out"),
        ("passive", "explore.num_candidates=4", "add --set explore.self_label_ratio=0.3, or leave it out"),
    ],
)
def test_what_is_typed_for_nothing_is_refused(rule: str, setting: str, words: str) -> None:
    assert words in refused(preset="demo", flags={"explore.rule": rule}, sets=[setting])


ASYNC = {"rollout.asynchronous": True}


def test_sampling_ahead_gives_each_process_a_gpu_of_its_own() -> None:
    for flags, learners, actors in (
        ({"placement.gpus": 2}, 1, 1),
        ({"placement.gpus": 5}, 2, 3),
        ({"placement.gpus": 4, "placement.actors": 3}, 1, 3),
        ({"placement.gpus": 4, "placement.learners": 1}, 1, 3),
    ):
        config = resolved(8, preset="tldr", flags=ASYNC | flags | {"rollout.prompts_per_step": 96})
        assert (config.placement.learners, config.placement.actors) == (learners, actors)
        gpus = [place.gpu for place in places(config, cores=(0, 1))]
        assert len(set(gpus)) == len(gpus) and config.sync.transport == "shm"
        assert resolve(config, 8, is_resumed=True) == config
    on_cpu = resolved(0, flags=ASYNC)
    assert (on_cpu.placement.learners, on_cpu.placement.actors) == (1, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ASYNC | {"placement.gpus": 1},
            ["a GPU for each process", "1 learner rank and 1 actor have 1 GPU", "--no-async"],
        ),
        (ASYNC | {"placement.gpus": 4, "placement.actors": 4}, ["1 learner rank and 4 actors have 4 GPUs"]),
        (ASYNC | {"rollout.sync_every": 4}, ["syncs after each step", "--sync-every 1"]),
        (ASYNC | {"explore.rule": "sea-bai"}, ["--explore sea-bai", "--no-async"]),
        (ASYNC | {"explore.rule": "passive"}, ["a head that learns from each step in turn", "--no-async"]),
        (ASYNC | {"explore.rule": "apl"}, ["asks the learner's reference", "--no-async"]),
        ({"rollout.max_staleness": 2}, ["--max-staleness is for --async"]),
        ({"rollout.strict_staleness": True}, ["add --async"]),
        (OFFLINE | ASYNC, ["--async is for rollouts"]),
        (OFFLINE | {"learner.importance_cap": 2.0}, ["importance_cap=... is for rollouts"]),
    ],
)
def test_what_does_not_go_with_sampling_ahead(flags: dict[str, Any], words: list[str]) -> None:
    # As they would be typed.
    sets = [f"{key}={str(value).lower()}" for key, value in flags.items() if key not in FLAGS]
    message = refused(4, flags={key: value for key, value in flags.items() if key in FLAGS}, sets=sets)
    for word in words:
        assert word in message


def test_a_template_that_cannot_be_used() -> None:
    assert "--set" in refused(sets=["data.prompt_template=Answer:"])
    assert "{prompt} once" in refused(sets=["data.prompt_template=Q {prompt} {prompt}"])
    both = refused(sets=["data.prompt_template=Q: {prompt}"], flags={"data.chat_template": True})
    assert "both given" in both and "--no-chat-template" in both


def test_a_list_can_be_given_on_the_command_line() -> None:
    given = resolved(flags={"lora.rank": 4}, sets=['lora.targets=["q_proj", "v_proj"]'])
    assert given.lora.targets == ("q_proj", "v_proj")


def test_the_demo_asked_for_by_name_takes_one_gpu_unless_told_otherwise() -> None:
    for there in (0, 1, 2, 3, 8):
        assert resolved(there, preset="demo").placement.gpus == min(1, there)
    assert resolved(4, preset="demo", flags={"placement.gpus": 4}).placement.gpus == 4


def test_an_adapter_counts_twice_unless_told_otherwise() -> None:
    assert resolved(flags={"lora.rank": 8}).lora.alpha == 16
    assert resolved(flags={"lora.rank": 8, "lora.alpha": 5}).lora.alpha == 5
    assert resolved().lora.alpha is None


def test_no_task_given_means_the_demo_on_the_cpu_and_tldr_on_gpus() -> None:
    assert resolved(0).model.path == "demo"
    assert resolved(0).placement.gpus == 0
    for there, used in ((1, 1), (2, 2), (4, 2)):
        config = resolved(there)
        assert config.oracle.path == ("llm-blender/PairRM-hf",)
        assert config.placement.gpus == config.placement.actors == config.placement.learners == used
    assert resolved(4, flags={"placement.gpus": 4}).placement.gpus == 4
    on_cpu = resolved(4, flags={"placement.gpus": 0})
    assert (on_cpu.model.path, on_cpu.placement.gpus) == ("demo", 0)


def test_an_offline_run_has_learners_alone() -> None:
    config = resolved(2, flags=OFFLINE)
    assert (config.placement.learners, config.placement.actors) == (2, 0)
    assert (config.oracle.path, config.data.prompts) == ((), None)
    assert resolve(config, 2) == config
    assert [place.name for place in places(config, cores=(0, 1))] == ["learner 0", "learner 1"]


def test_an_offline_run_takes_of_a_preset_what_it_can_use() -> None:
    config = resolved(2, preset="tldr", flags={key: OFFLINE[key] for key in ("rollout.offline", "data.preferences")})
    assert config.model.path == "trl-lib/pythia-1b-deduped-tldr-sft" and config.learner.lr == 5e-7
    assert (config.oracle.path, config.data.prompts, config.data.max_prompts) == ((), None, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rollout.offline": True}, ["--preferences"]),
        ({"rollout.offline": True, "data.preferences": "a/b"}, ["--model"]),
        ({"data.preferences": "a/b", "model.path": "c/d"}, ["--offline"]),
        (OFFLINE | {"oracle.path": "o"}, ["oracle.path = o", "no oracle"]),
        (OFFLINE | {"data.prompts": "p"}, ["data.prompts = p"]),
        (OFFLINE | {"data.max_queries": 500}, ["data.max_queries = 500"]),
        (OFFLINE | {"placement.actors": 1}, ["placement.actors = 1"]),
        (OFFLINE | {"sampling.max_new_tokens": 30}, ["--max-new-tokens is for rollouts"]),
        (OFFLINE | {"rollout.sync_every": 4}, ["--sync-every is for rollouts"]),
        (OFFLINE | {"data.preferences": "pairs.jsonl"}, ["data.preferences = pairs.jsonl", "no such file"]),
        (OFFLINE | {"placement.learners": 3}, ["128 does not split over 3 learner ranks", "--prompts-per-step 126"]),
    ],
)
def test_what_does_not_go_with_offline(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(0, flags=flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["learner.optimizer_offload=true"], "ZeRO stage 1 or 2 or 3, and learner.zero_stage is 0"),
        (["learner.parameter_offload=true", "learner.zero_stage=2"], "--set learner.zero_stage=3"),
        (["learner.reference_offload=true", "lora.rank=8"], "the policy's own base"),
    ],
)
def test_what_cannot_be_offloaded(sets: list[str], words: str) -> None:
    assert words in refused(sets=sets)
    resolved(sets=["learner.optimizer_offload=true", "learner.parameter_offload=true", "learner.zero_stage=3"])


@pytest.mark.parametrize(
    ("num_gpus", "sets", "words"),
    [
        (0, ["lora.rank=8"], "is for GPUs, and this run has none"),
        (1, [], "there is none; type --lora-rank 16"),
        (1, ["lora.rank=8", "learner.zero_stage=3"], "--set learner.zero_stage=2"),
        (1, ["lora.rank=8", "lora.sync=adapter"], "--set lora.sync=merged"),
    ],
)
def test_what_cannot_be_quantized(num_gpus: int, sets: list[str], words: str) -> None:
    assert words in refused(num_gpus, sets=["lora.quantize=nf4", *sets])


def test_weights_go_by_cuda_ipc_where_every_actor_is_on_its_learners_gpu() -> None:
    def transport(num_gpus: int, **placement: int) -> str:
        flags = {f"placement.{key}": value for key, value in ({"gpus": num_gpus} | placement).items()}
        return resolved(num_gpus, preset="demo", flags=flags | {"learner.micro_batch_size": 4}).sync.transport

    assert transport(0) == "shm"
    assert transport(1) == transport(2) == "cuda_ipc"
    assert transport(2, actors=1, learners=1) == transport(2, actors=2, learners=1) == "shm"
    assert transport(2, gpus_per_actor=2) == transport(4, gpus_per_actor=2) == "cuda_ipc"
    assert transport(3, gpus_per_actor=2) == "shm"
    split = {"placement.gpus": 2, "placement.actors": 1, "placement.learners": 1, "sync.transport": "cuda_ipc"}
    assert "GPUs of their own" in refused(2, preset="demo", flags=split)


def test_a_task_of_ones_own_takes_no_preset() -> None:
    own = {"model.path": "m", "data.prompts": "p", "oracle.path": "o"}
    config = resolved(0, flags=own)
    assert config.rollout.prompts_per_step == 128
    assert config.eval.gold_score is None
    assert "give both" in refused(flags={"model.path": "m"})
    assert "give both" in refused(flags={"data.prompts": "p"})
    assert "--oracle" in refused(flags={"model.path": "m", "data.prompts": "p"})


def test_later_layers_win_key_by_key() -> None:
    file = toml("[learner]\nlr = 2e-4\npasses = 3\n[run]\nseed = 7\n")
    config = resolved(preset="demo", file=file, flags={"learner.lr": 3e-4}, sets=["run.seed=8"])
    assert (config.learner.lr, config.learner.passes, config.run.seed) == (3e-4, 3, 8)
    assert config.learner.micro_batch_size == 16, "from the preset"
    assert config.learner.max_grad_norm == 1.0, "from the schema"


def test_another_algorithm_starts_from_its_own_defaults() -> None:
    assert resolved(preset="demo").algorithm.beta == 2.0  # type: ignore[union-attr]
    assert resolved(preset="demo", flags={"algorithm.name": "dpo"}).algorithm.beta == 0.1  # type: ignore[union-attr]
    same = resolved(file=toml("[algorithm]\nname = 'dpo'\nbeta = 0.3"), flags={"algorithm.name": "dpo"})
    assert same.algorithm.beta == 0.3  # type: ignore[union-attr]


def test_options_of_an_own_algorithm_are_collected() -> None:
    Path("mine.py").touch()
    file = toml("[algorithm]\nname = 'mine.py:Mine'\n[algorithm.options]\na = 1\nb = 'x'\n")
    config = resolved(file=file, sets=["algorithm.options.b=y", "algorithm.options.c=[1, 2]"])
    assert config.algorithm.options == {"a": 1, "b": "y", "c": [1, 2]}  # type: ignore[union-attr]
    assert config.run.name is not None
    assert re.fullmatch(r"mine-\d{8}-\d{6}", config.run.name)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learner.lr=1e-6", 1e-6),
        ("learner.lr=1", 1.0),
        ("run.wandb=true", True),
        ("run.name=bare-word", "bare-word"),
        ("run.name=12", "12"),
        ('run.name="quoted"', "quoted"),
        ("learner.adam_betas=[0.8, 0.9]", (0.8, 0.9)),
        ("data.reference_key=", None),
        ("data.eval_split=a=b", "a=b"),
    ],
)
def test_values_of_set(setting: str, value: Any) -> None:
    section, _, key = setting.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(num_gpus=0, sets=[setting]), section), key) == value


# Mistakes


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learner.lrr=3", ["learner.lrr", "--set learner.lrr=...", "did you mean learner.lr"]),
        ("lerner.lr=3", ["did you mean learner.lr"]),
        ("learner.temperature=3", ["did you mean sampling.temperature"]),
        ("lr=3", ["did you mean learner.lr"]),
        ("algorithm=dpo", ["is a section"]),
        ("learner.lr", ["section.key=value"]),
        ("learner.lr=true", ["must be a number", "--lr 5e-07"]),
        ("learner.lr=-1", ["learner.lr = -1", "greater than 0"]),
        ("learner.lr=inf", ["finite"]),
        ("learner.lr=fast", ["'fast'", "must be a number"]),
        ("learner.micro_batch_size=1.5", ["whole number", "--micro-batch-size 8"]),
        ("learner.micro_batch_size=true", ["whole number"]),
        ("learner.adam_betas=[0.9]", ["too few"]),
        ("learner.adam_betas=[0.9", ["no valid TOML"]),
        ("run.ui=liv", ["'auto', 'live' or 'plain'", "--ui live"]),
        ("run.name=a/b", ["plain folder name", "--name a-b"]),
        ("run.name=..", ["plain folder name"]),
        ("run.wandb=yes", ["true or false"]),
        ("algorithm.name=smipo", ["--algo simpo"]),
        ("algorithm.options.x=1", ["simpo has beta"]),
        ("algorithm.name=gone.py:Mine", ["there is no file gone.py"]),
        ("algorithm.name={a = ':'}", ["algorithm.name = {'a': ':'}", "must be text"]),
        # Lists as long as these numbers would fill the memory before anything else could refuse them.
        ("placement.actors=10000000", ["must be at most 1024"]),
        ("placement.learners=10000000", ["must be at most 1024"]),
        ("rollout.prompts_per_step=1000000001", ["must be at most 100000"]),
        ("learner.micro_batch_size=1000000000", ["must be at most 100000"]),
        ("learner.batch_size=1000000000", ["must be at most 100000"]),
        ("learner.lr=" + "[" * 3000, ["learner.lr", "nested too deeply"]),
        ("eval.gold_score=score", ["file.py:name"]),
        ("sync.transport=cuda_ipc", ["needs a GPU"]),
        ("data.max_prompts=10", ["one step's prompts", "--max-prompts 64"]),
        ("data.max_queries=10", ["one step's prompts"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_where_and_what_to_type(setting: str, words: list[str]) -> None:
    line = refused(sets=[setting])
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[learner]\nlr = 'x'", ["learner.lr = 'x'", "given.toml", "[learner] lr = 5e-07"]),
        ("[lerner]\nlr = 1", ["[lerner]", "did you mean [learner]"]),
        ("learner = 3", ["is a section"]),
        ("lr = 3", ["did you mean learner.lr"]),
        ("[learner", ["given.toml", "no valid TOML"]),
        ("[learner]\nui = 'live'", ["did you mean run.ui"]),
        ("[algorithm]\nname = 'dpo'\ngamma_beta_ratio = 1", ["dpo has beta"]),
        ("[algorithm]\nname = 'a.py:B'\nbeta = 1", ["algorithm.options.beta"]),
        ("[rollout]\nprompts_per_step = -1\nsync_every = 0", ["prompts_per_step", "(and 1 more)"]),
        ("[algorithm]\nname = {a = ':'}", ["algorithm.name = {'a': ':'}", "must be text"]),
        ("[learner]\nlr = " + "[" * 3000 + "]" * 3000, ["nested too deeply"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(text: str, words: list[str]) -> None:
    line = refused(file=toml(text))
    for word in [*words, "given.toml"]:
        assert word in line


def test_files_and_presets_that_are_not_there() -> None:
    assert "cannot read" in refused(file=Path("gone.toml"))
    assert "cannot read" in refused(file=Path())
    Path("binary.toml").write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused(file=Path("binary.toml"))
    assert "--preset tldr" in refused(preset="tldt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"oracle.path": ["remote"]}, ["add --oracle-url http://HOST:PORT"]),
        ({"oracle.path": ["judge"]}, ["add --judge-model NAME"]),
        ({"eval.oracle": ["judge"]}, ["add --judge-model NAME"]),
        ({"oracle.path": ["remote"], "remote.url": "here:80"}, ["remote.url = here:80 is no web address"]),
        ({"oracle.path": ["http://h:8000"]}, ["type --oracle remote --oracle-url http://h:8000"]),
        ({"oracle.path": ["gone.py:score"]}, ["there is no file gone.py"]),
        ({"oracle.path": ["module:not-a-name"]}, ["must look like file.py:name"]),
        ({"oracle.path": ["judge"], "judge.model": "m", "judge.url": "http://h:99999/v1"}, ["no web address", "Port"]),
        ({"oracle.path": ["remote"], "remote.url": "http://a b:80"}, ["no web address"]),
        *(
            ({"oracle.path": ["remote"], "remote.url": url}, [f"remote.url = {url} is no web address", "--oracle-url"])
            for url in ("http://[", "http://h:port", "http://h:0", "ftp://h", "http://:80", "http://1.2.3.400:80")
        ),
        ({"oracle.path": ["judge"], "judge.model": "m", "judge.url": "https://me:hunter2@h/v1"}, ["holds a password"]),
        ({"oracle.path": ["remote"], "remote.url": "http://h:1", "remote.batch_size": 4097}, ["must be at most 4096"]),
        ({"oracle.path": ["remote"], "remote.url": "http://me:hunter2@h:port"}, ["http://***@h:port is no web addr"]),
        ({"oracle.path": ["remote"], "remote.url": "http://me:hunter2@h"}, ["holds a password", "environment"]),
        ({"oracle.path": ["remote"], "remote.url": "http://h/?key=1"}, ["holds a query", "environment"]),
        ({"explore.num_candidates": 4}, ["--num-candidates is for exploration", "add --explore sea-bai"]),
        ({"explore.rule": "best"}, ["'sea-bai'", "'apl'"]),
        ({"oracle.weights": "1,2"}, ["2 numbers", "1 oracle", "leave it out"]),
        ({"oracle.path": ["a", "b"], "oracle.weights": "1"}, ["1 number", "2 oracles", "--oracle-weights 1,1"]),
        ({"oracle.weights": "1,x"}, ["oracle.weights = '1,x' (--oracle-weights) must be numbers with commas"]),
        ({"oracle.flip_prob": 1.5}, ["oracle.flip_prob = 1.5", "at most 1"]),
    ],
)
def test_an_oracle_that_cannot_be_is_one_line(flags: dict[str, object], words: list[str]) -> None:
    message = refused(preset="demo", flags=flags)
    assert all(word in message for word in words), message
    assert "hunter2" not in message


def test_the_oracle_of_evaluation_has_options_of_its_own_and_else_those_of_training() -> None:
    flags = {
        "oracle.path": ["remote"], "oracle.chat_template": True, "oracle.max_tokens": 99, "remote.url": "http://h:1",
        "eval.oracle": ["a", "b"], "eval.weights": "1,2", "eval.chat_template": False,
    }  # fmt: skip
    config = resolved(preset="demo", flags=flags, file=toml("[judge]\nmodel = 'j'\n"))
    seen = for_evaluation(config)
    assert (seen.oracle.path, seen.oracle.weights, seen.oracle.chat_template) == (("a", "b"), (1.0, 2.0), False)
    assert (seen.oracle.max_tokens, seen.remote.url, seen.judge.model) == (99, "http://h:1", "j")
    assert config.oracle.chat_template is True and config.oracle.path == ("remote",)
    elsewhere = {"eval.oracle": ["remote"], "eval.url": "http://h:2", "remote.url": "http://h:1"}
    assert for_evaluation(resolved(preset="demo", flags=elsewhere)).remote.url == "http://h:2"
    alone = {"eval.oracle": ["judge"], "eval.judge_model": "other"}
    assert for_evaluation(resolved(preset="demo", flags=alone)).judge.model == "other"


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ({"oracle.path": ["judge"], "eval.oracle": ["judge"], "judge.model": "m"}, "eval.judge_key_env"),
        ({"oracle.path": ["remote"], "eval.oracle": ["remote"]}, "eval.token_env"),
    ],
)
def test_a_secret_is_sent_to_one_host_unless_told(kind: dict[str, Any], own: str) -> None:
    training, evaluation = ("judge.url", "eval.judge_url") if "judge.model" in kind else ("remote.url", "eval.url")
    here = kind | {training: "http://one:1/v1", evaluation: "http://one:2/v1"}
    assert resolved(preset="demo", flags=here)
    there = here | {evaluation: "http://two:1/v1"}
    said = refused(preset="demo", flags=there)
    assert "evaluation asks two" in said and "is for one" in said and f"--set {own}=NAME" in said
    seen = for_evaluation(resolved(preset="demo", flags=there | {own: "OTHER"}))
    assert (seen.judge.key_env if "judge.model" in kind else seen.remote.token_env) == "OTHER"
    alone = there | {"oracle.path": ["demo"]}
    assert resolved(preset="demo", flags=alone), "nothing of training's is asked, so no other host knows the secret"
    assert "2 oracles" in refused(preset="demo", flags={"eval.oracle": ["a", "b"], "eval.weights": "1"})


def test_one_oracle_or_several_read_back_from_the_written_configuration(tmp_path: Path) -> None:
    for flags in ({"oracle.path": "a"}, {"oracle.path": ["a", "b"], "oracle.weights": "0.7,0.3"}):
        config = load_config(preset="demo", flags=flags, num_gpus=0)
        (tmp_path / "written.toml").write_text(dump_toml(config))
        assert load_config(file=tmp_path / "written.toml", num_gpus=0) == config
    assert config.oracle.path == ("a", "b") and config.oracle.weights == (0.7, 0.3)


@pytest.mark.parametrize("setting", ["model.path=./gone", "oracle.path=/gone", "data.prompts=gone.jsonl"])
def test_local_paths_that_are_not_there(setting: str) -> None:
    assert "no such file" in refused(preset="demo", sets=[setting])


def test_the_same_option_twice_on_the_command_line() -> None:
    assert "given twice" in refused(flags={"learner.lr": 1e-4}, sets=["learner.lr=2e-4"])
    assert resolved(flags={"learner.lr": 1e-4}, sets=["learner.lr=1e-4"]).learner.lr == 1e-4


# Resolving


def test_what_was_left_open_is_filled_in() -> None:
    on_cpu, on_gpus = resolved(0), resolved(2, preset="tldr")
    assert (on_cpu.placement.gpus, on_cpu.placement.learners, on_cpu.placement.actors) == (0, 1, 1)
    assert (on_cpu.model.dtype, on_cpu.oracle.dtype, on_cpu.sync.transport) == ("float32", "float32", "shm")
    assert (on_cpu.learner.batch_size, on_cpu.learner.zero_stage, on_cpu.model.reference) == (64, 0, "demo")
    assert on_cpu.eval.gold_score == "oatlite.demo.task:true_score"
    assert (on_gpus.placement.gpus, on_gpus.placement.learners, on_gpus.placement.actors) == (2, 2, 2)
    assert (on_gpus.model.dtype, on_gpus.oracle.dtype, on_gpus.sync.transport) == ("bfloat16", "bfloat16", "cuda_ipc")
    assert (on_gpus.learner.batch_size, on_gpus.learner.zero_stage) == (128, 2)
    assert on_gpus.eval.gold_score is None


def test_resolving_twice_changes_nothing() -> None:
    once = resolved(2, preset="tldr")
    assert resolve(once, 2) == once


@pytest.mark.parametrize(
    ("num_gpus", "flags", "words"),
    [
        (0, {"placement.gpus": 2}, ["has none", "--gpus 0"]),
        (1, {"placement.gpus": 2}, ["has 1", "--gpus 1"]),
        (0, {"placement.learners": 2, "placement.actors": 1}, ["--actors 2", "--learners 1"]),
        (0, {"lora.sync": "adapter"}, ["there is none", "--lora-rank 16"]),
        (0, {"lora.targets": ["q_proj"]}, ["there is none", "--lora-rank 16"]),
        (0, {"lora.rank": 1024, "lora.sync": "adapter"}, ["up to rank 512", "--lora-rank 512", "lora.sync=merged"]),
        (2, {"placement.learners": 4}, ["do not fit on 2 GPUs", "--learners 2"]),
        (0, {"placement.learners": 3}, ["--prompts-per-step 63", "--prompts-per-step 66"]),
        (0, {"placement.actors": 3}, ["--prompts-per-step 63", "--prompts-per-step 66"]),
        (0, {"placement.learners": 2, "placement.actors": 5}, ["2 or 3 actors", "--prompts-per-step 60"]),
        (0, {"rollout.prompts_per_step": 100}, ["--micro-batch-size 10", "--prompts-per-step 96"]),
        (0, {"learner.batch_size": 40}, ["--micro-batch-size 10", "--batch-size 32", "--batch-size 48"]),
        (0, {"learner.batch_size": 48}, ["no multiple of learner.batch_size", "--batch-size 32", "--batch-size 64"]),
        (0, {"learner.batch_size": 128}, ["--batch-size 64", "--prompts-per-step 128"]),
    ],
)
def test_numbers_that_cannot_work_say_which_would(num_gpus: int, flags: dict[str, Any], words: list[str]) -> None:
    line = refused(num_gpus, preset="demo", flags={"placement.gpus": num_gpus} | flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize("flags", [{"learner.batch_size": 40}, {"rollout.prompts_per_step": 100}])
def test_the_numbers_that_an_error_proposes_do_work(flags: dict[str, int]) -> None:
    line = refused(flags=flags)
    proposals = re.findall(r"--([a-z-]+) (\d+)", line)
    assert len(proposals) >= 2
    keys = {"batch-size": "learner.batch_size", "prompts-per-step": "rollout.prompts_per_step"}
    for flag, number in proposals:
        proposed = flags | {keys.get(flag, "learner.micro_batch_size"): int(number)}
        # Another batch size may then ask for another number of prompts; the mistake itself must be gone.
        assert "learner.micro_batch_size" not in _complaint(proposed)


def _complaint(flags: dict[str, int]) -> str:
    try:
        resolved(flags=flags)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_run_folder() -> None:
    Path("runs/used").mkdir(parents=True)
    assert resolved(flags={"run.name": "used"}).run.name == "used", "an empty folder is free"
    Path("runs/used/file").touch()
    assert "--name used-2" in refused(flags={"run.name": "used"})
    assert "no folder that you may write to" in refused(flags={"run.dir": "runs/used/file/deeper"})


def test_the_number_of_steps() -> None:
    assert num_steps(resolved()) == 24
    assert num_steps(resolved(flags={"data.epochs": 2})) == 48
    assert num_steps(resolved(flags={"data.epochs": 2, "data.max_queries": 1000})) == 16
    assert num_steps(resolved(flags={"model.path": "m", "data.prompts": "p", "oracle.path": "o"})) is None


# Repeating


@pytest.mark.parametrize("preset", ["demo", "tldr"])
def test_the_dump_repeats_the_run(preset: str) -> None:
    config = resolved(2, preset=preset, sets=["run.seed=5", "data.reference_key="])
    again = load_config(file=toml(dump_toml(config)), num_gpus=2)
    assert again.run.name is None, "a repetition gets a folder of its own"
    assert again.model_copy(update={"run": config.run}) == config
    renamed = resolve(again, 2)
    assert renamed.model_copy(update={"run": config.run}) == config


def test_the_dump_keeps_every_odd_text_and_option() -> None:
    name = 'a "quoted" \\ back\\slash\nnew line\ttab \x7f \x00 ünï 🎉 # no comment'
    options = {"text": name, "deep": {"list": [1, 2.5, True, {"k": "v"}], "odd key.": []}}
    values = resolved().model_dump()
    values["algorithm"] = {"name": "a.py:B", "options": options}
    values["data"]["prompt_key"] = name
    config = Config.model_validate(values)
    again = load_config(file=toml(dump_toml(config)), num_gpus=0)
    assert again.model_copy(update={"run": config.run}) == config


def test_the_dump_names_the_run_in_a_comment_alone() -> None:
    text = dump_toml(resolved(flags={"run.name": "first"}))
    assert '"first"' in text.splitlines()[0]
    assert "name" not in tomllib.loads(text)["run"]


def test_toml_has_no_form_for_an_object() -> None:
    with pytest.raises(TypeError, match="no form"):
        toml_value(object())


# Places and hardware


def test_places_share_gpus_unless_there_are_enough() -> None:
    def gpus_of(num_gpus: int, **flags: int) -> list[tuple[str, int | None, int]]:
        given = {f"placement.{key}": value for key, value in ({"gpus": num_gpus} | flags).items()}
        config = resolved(num_gpus, preset="demo", flags=given)
        return [(place.name, place.gpu, place.serves) for place in places(config, range(8))]

    assert gpus_of(0) == [("learner 0", None, 0), ("actor 0", None, 0)]
    assert gpus_of(2) == [("learner 0", 0, 0), ("learner 1", 1, 1), ("actor 0", 0, 0), ("actor 1", 1, 1)]
    assert gpus_of(2, learners=1, actors=1) == [("learner 0", 0, 0), ("actor 0", 1, 0)]


def test_an_actor_with_several_gpus_shares_its_first_with_a_learner_or_none() -> None:
    def gpus_of(num_gpus: int, each: int, **flags: Any) -> list[tuple[int, ...]]:
        given = {
            f"placement.{key}": value for key, value in ({"gpus": num_gpus, "gpus_per_actor": each} | flags).items()
        }
        config = resolved(num_gpus, preset="demo", flags=given)
        return [place.gpus for place in places(config, range(8))]

    assert gpus_of(0, 3) == [(), ()]
    assert gpus_of(2, 2) == [(0,), (0, 1)]
    assert gpus_of(3, 2) == [(0,), (1, 2)]
    assert gpus_of(4, 2) == [(0,), (2,), (0, 1), (2, 3)]
    assert gpus_of(4, 2, learners=1) == [(0,), (0, 1), (2, 3)]
    assert gpus_of(4, 2, actors=1) == [(0,), (1, 2)]
    assert gpus_of(5, 2, learners=1) == [(0,), (1, 2), (3, 4)]
    ahead = {"rollout.asynchronous": True, "placement.gpus": 8, "placement.gpus_per_actor": 2}
    config = resolved(8, preset="tldr", flags=ahead)
    assert (config.placement.learners, config.placement.actors) == (2, 3)


@pytest.mark.parametrize(
    ("num_gpus", "flags", "words"),
    [
        (1, {}, ["1 actor of placement.gpus_per_actor = 2", "2 GPUs", "there is 1", "type --gpus-per-actor 1"]),
        (4, {"placement.actors": 3}, ["6 GPUs", "there are 4", "--gpus-per-actor 1 or --actors 2"]),
        (2, {"rollout.asynchronous": True}, ["GPUs of its own", "1 actor of 2 GPUs each have 2 GPUs", "--no-async"]),
        (2, {"placement.gpus_per_actor": 0}, ["must be greater than 0"]),
    ],
)
def test_gpus_that_are_not_there_for_each_actor(num_gpus: int, flags: dict[str, Any], words: list[str]) -> None:
    line = refused(num_gpus, preset="demo", flags={"placement.gpus": num_gpus, "placement.gpus_per_actor": 2} | flags)
    for word in words:
        assert word in line


def test_engines_sleep_where_each_shares_its_learners_gpu() -> None:
    def sleeps(num_gpus: int, **more: Any) -> bool | None:
        flags = {f"placement.{key}": value for key, value in ({"gpus": num_gpus} | more).items()}
        return resolved(num_gpus, preset="demo", flags=flags | {"learner.micro_batch_size": 4}).placement.sleep

    assert [sleeps(0), sleeps(1), sleeps(2)] == [False, True, True]
    assert sleeps(2, actors=1, learners=1) is False, "GPUs of their own"
    assert sleeps(2, actors=2, learners=1) is False, "one of two"
    assert sleeps(1, actors=2) is True
    assert sleeps(1, sleep=False) is False
    for num_gpus, more in ((0, {}), (2, {"actors": 1, "learners": 1})):
        flags = {f"placement.{key}": value for key, value in ({"gpus": num_gpus, "sleep": True} | more).items()}
        line = refused(num_gpus, preset="demo", flags=flags)
        assert "placement.sleep = true" in line and "--set placement.sleep=false" in line
    assert (
        resolved(flags={"rollout.offline": True, "data.preferences": "hub/p", "model.path": "hub/m"}).placement.sleep
        is False
    )


def test_a_gpu_is_shared_by_more_than_one_process() -> None:
    def shared(num_gpus: int, **flags: int) -> list[str]:
        given = {f"placement.{key}": value for key, value in ({"gpus": num_gpus} | flags).items()}
        everybody = places(resolved(num_gpus, preset="demo", flags=given), cores=(0,))
        return [place.name for place in everybody if is_shared(place, everybody)]

    assert shared(0) == [] and shared(2, actors=1, learners=1) == []
    assert shared(1) == ["learner 0", "actor 0"]
    assert shared(2, actors=2, learners=1) == ["learner 0", "actor 0"]


def test_cores_are_shared_out_whole() -> None:
    config = resolved(flags={"placement.learners": 2, "placement.actors": 4})
    found = places(config, [3, 4, 5, 6, 7])
    for role in ("learner", "actor"):
        cores = [core for place in found if place.role == role for core in place.cores]
        assert sorted(cores) == [3, 4, 5, 6, 7]
    few = places(config, [3])
    assert all(place.cores == (3,) for place in few)
    assert [actors_of_rank(config, rank) for rank in (0, 1)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, "abc"),
        ("", ""),
        ("-1", ""),
        ("2,0", "ca"),
        ("0,7,1", "a"),
        ("GPU-b", "b"),
        ("GPU-", ""),
        ("nonsense", ""),
    ],
)
def test_visible_gpus(mask: str | None, expected: str) -> None:
    gpus = [Gpu(f"GPU-{letter}", letter) for letter in "abc"]
    assert "".join(gpu.name for gpu in visible(gpus, mask)) == expected


def test_a_learner_starts_after_the_actors_on_its_gpu_and_nobody_else_waits() -> None:
    def waits(num_gpus: int, **placement: int) -> dict[str, list[str]]:
        flags = {f"placement.{key}": value for key, value in ({"gpus": num_gpus} | placement).items()}
        config = resolved(num_gpus, preset="demo", flags=flags | {"learner.micro_batch_size": 4})
        everybody = places(config, cores=(0, 1))
        return {p.name: [other.name for other in starts_after(p, everybody)] for p in everybody}

    shared = waits(2)
    assert waits(4, gpus_per_actor=2) == shared
    assert (shared["learner 0"], shared["learner 1"]) == (["actor 0"], ["actor 1"])
    assert shared["actor 0"] == shared["actor 1"] == []
    assert not any(waits(2, actors=1, learners=1).values()), "on GPUs of their own"
    assert not any(waits(0).values()), "on the CPU"

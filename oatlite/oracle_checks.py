"""What an oracle needs, found out before a process is spawned: its files, and its answer to one question."""

from __future__ import annotations

from collections.abc import Sequence

from oatlite.config.flags import to_type
from oatlite.config.oracle_names import for_evaluation, kind_of
from oatlite.config.schema import Config
from oatlite.data import load_tokenizer
from oatlite.errors import ConfigError, OracleError
from oatlite.model_checks import check_weights

TRIAL_S = 30.0
"""A server has so long to answer the one question that is asked before a run."""


def check_oracle_models(config: Config) -> list[str]:
    """That each oracle which is a model can be one, and takes responses as long as the run's; what is worth saying of
    those that can.

    Reads configurations, tokenizers and headers of weights. Raises ConfigError.
    """
    if not config.oracle.path:
        raise ConfigError("oracle.path names no oracle", "give a reward model, a folder or a hub id")
    notes = []
    for each in both_purposes(config):
        names = each.oracle.path
        for name in names:
            if kind_of(name) == "model":
                notes.append(_check_model(name, each, is_alone=len(names) == 1))
            elif kind_of(name) in ("judge", "remote") and len(names) > 1:
                raise ConfigError(
                    f"the oracle {name} only compares, and rewards are what can be added", "give it alone"
                )
    return [note for note in dict.fromkeys(notes) if note]


def check_encoder(config: Config) -> None:
    """That there is something to compute the epistemic head's features with. Raises ConfigError."""
    encoder = config.explore.encoder
    names = config.oracle.path if encoder is None else (encoder,)
    if encoder is None and (len(names) > 1 or kind_of(names[0]) != "model"):
        raise ConfigError(
            f"the oracle {', '.join(names)} has no encoder, and --explore {config.explore.rule} learns from features",
            f"name one with {to_type('explore.encoder', 'MODEL')}, such as a reward model or pairrm",
        )
    if encoder is not None:
        from oatlite.oracles.loading import read_config

        read_config(encoder)
        check_weights(encoder, "the encoder")


def _check_model(path: str, config: Config, *, is_alone: bool) -> str:
    """What is worth saying of it."""
    from oatlite.oracles.loading import is_pairrm, read_config, token_limit, unused_template
    from oatlite.oracles.reward_model import check_reward_model

    trusted = {"trust_remote_code": config.model.trust_remote_code}
    model = read_config(path, **trusted)
    compares_pairs = is_pairrm(model)
    if compares_pairs and not is_alone:
        raise ConfigError(f"the oracle {path} only compares, and rewards are what can be added", "give it alone")
    limit = token_limit(config.oracle.max_tokens, model if compares_pairs else check_reward_model(path, **trusted))
    check_weights(path, "the reward model")
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    num_responses = 2 if compares_pairs else 1
    if num_responses * config.sampling.max_new_tokens >= limit:
        what = "two responses together can have" if compares_pairs else "a response can have"
        raise ConfigError(
            f"the oracle takes {limit} tokens, prompt included, and {what} "
            f"{num_responses * config.sampling.max_new_tokens}",
            to_type("oracle.max_tokens", 1024) if limit < token_limit(1024, model) else "lower --max-new-tokens",
        )
    if not config.oracle.chat_template:
        return "" if compares_pairs else unused_template(path, tokenizer, config.oracle.chat_template)
    if compares_pairs:
        raise ConfigError("PairRM reads plain text, and oracle.chat_template = true", "oracle.chat_template = false")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"the tokenizer of {path} has no chat template", "set oracle.chat_template = false")
    return ""


def try_oracles(config: Config, prompt: str, reference: str | None) -> None:
    """Ask each oracle that is a function or a server about one pair on ``prompt``, and look at its answer.

    Raises ConfigError for a function, and OracleError for a server, that cannot be used.
    """
    for each in both_purposes(config):
        asked = [name for name in each.oracle.path if kind_of(name) != "model"]
        if asked:
            _try(asked, each, prompt, reference)


def both_purposes(config: Config) -> list[Config]:
    """The configuration as training's oracle sees it, and as that of evaluation does, if it is another."""
    return [config, for_evaluation(config)] if config.eval.oracle else [config]


def _try(names: Sequence[str], config: Config, prompt: str, reference: str | None) -> None:
    from oatlite.oracles import build_oracle, checked

    hurried = config.timeouts.model_copy(update={"oracle_s": min(TRIAL_S, config.timeouts.oracle_s)})
    equal = config.oracle.model_copy(update={"weights": ()})
    config = config.model_copy(update={"timeouts": hurried, "oracle": equal})
    oracle = build_oracle(names, config, device="cpu")
    try:
        answer = oracle.compare(
            [prompt], [reference or "One answer."], ["Another answer."], None if reference is None else [reference]
        )
        checked(answer, 1)
    except OracleError as error:
        if all(kind_of(name) == "function" for name in names):
            raise ConfigError(error.message, error.fix) from error
        raise
    finally:
        oracle.close()

"""What a name given with ``--oracle`` means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from oatlite.config.schema import Config

Kind = Literal["model", "function", "remote", "judge"]

PAIRRM = {"pairrm": "llm-blender/PairRM-hf"}


def for_evaluation(config: Config) -> Config:
    """``config`` with the oracle of evaluation, and its own options where it has any, in place of that of training."""
    eval_ = config.eval
    own: dict[str, dict[str, Any]] = {
        "oracle": {"path": eval_.oracle, "chat_template": eval_.chat_template, "max_tokens": eval_.max_tokens},
        "remote": {"url": eval_.url, "token_env": eval_.token_env},
        "judge": {"model": eval_.judge_model, "url": eval_.judge_url, "key_env": eval_.judge_key_env},
    }
    changed = {
        section: getattr(config, section).model_copy(
            update={key: value for key, value in values.items() if value is not None}
        )
        for section, values in own.items()
    }
    changed["oracle"] = changed["oracle"].model_copy(update={"weights": eval_.weights})
    return config.model_copy(update=changed)


def kind_of(name: str) -> Kind:
    """``remote`` and ``judge`` mean themselves, ``file.py:name`` and ``package.module:name`` a function, and anything
    else a model: a folder or a hub id."""
    if name in ("remote", "judge"):
        return name  # type: ignore[return-value]  # which mypy does not narrow to
    if ":" in name and not Path(name).exists():
        return "function"
    return "model"


def oracle_names(config: Config) -> list[tuple[str, str]]:
    """Every oracle that is named, of training and of evaluation, each with its key."""
    keys = (("oracle.path", config.oracle.path), ("eval.oracle", config.eval.oracle))
    return [(key, name) for key, names in keys for name in names]

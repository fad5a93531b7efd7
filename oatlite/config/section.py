"""What every table of the configuration has in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _variable(value: str) -> str:
    """Not the secret itself, which has small letters or signs, if not both."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        raise ValueError("must be the name of an environment variable, in capitals, and never the secret itself")
    return value


VariableName = Annotated[str, AfterValidator(_variable)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen; refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

"""A Python function as the oracle, for rewards that can be verified. The names of its parameters say what it is.

    def score(prompt, response): ...                a reward, any finite number
    def score(prompt, response, reference): ...     the same, beside the dataset's answer
    def prefer(prompt, first, second): ...          the probability that the first response is better, or a boolean

Any of these may leave out ``prompt``, or add ``reference`` (with a default, it may be missing), and answers None where
it cannot say: such a pair carries no weight. A class derived from :class:`PreferenceOracle` or :class:`RewardOracle`,
made without arguments, does as well, and sees a batch at a time.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np

from oatlite.errors import ConfigError, OracleError
from oatlite.loading import load_callable
from oatlite.oracles.base import Floats, PreferenceOracle, RewardOracle, Verdicts, checked, checked_scores
from oatlite.sources import first_line

log = logging.getLogger(__name__)

Oracle = TypeVar("Oracle", bound=PreferenceOracle)

FORMS = "write score(prompt, response), score(prompt, response, reference) or prefer(prompt, first, second)"
LARGEST = float(np.finfo(np.float32).max)
REWARD, PREFERENCE = {"prompt", "response", "reference"}, {"prompt", "first", "second", "reference"}


def load_function_oracle(name: str) -> PreferenceOracle:
    """The oracle that ``file.py:name`` or ``package.module:name`` stands for.

    Raises ConfigError where it cannot be imported or has other parameters than those of the top of this file.
    """
    found = load_callable(name)
    if inspect.isclass(found):
        if not issubclass(found, PreferenceOracle):
            raise ConfigError(f"the oracle {name} is a class that is no PreferenceOracle", "derive it from one")
        try:
            oracle: PreferenceOracle = found()
        except (Exception, SystemExit) as error:  # a user's code raises what it likes
            raise ConfigError(
                f"the oracle {name} cannot be made: {type(error).__name__}: {first_line(error)}"
            ) from error
        return GuardedReward(name, oracle) if isinstance(oracle, RewardOracle) else GuardedPreference(name, oracle)
    parameters = _parameters(name, found)
    if {"first", "second"} <= parameters.keys() <= PREFERENCE:
        return FunctionPreference(name, found, parameters)
    if {"response"} <= parameters.keys() <= REWARD:
        return FunctionReward(name, found, parameters)
    raise ConfigError(f"the oracle {name} takes ({', '.join(sorted(parameters))})", FORMS)


def _parameters(name: str, function: Callable[..., Any]) -> dict[str, bool]:
    """What it can be given of what we have, and whatever else it must be given; and whether it must."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the oracle {name} has no signature: {first_line(error)}", FORMS) from error
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"the oracle {name} is a coroutine", "write it with def, not async def")
    names = {}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        is_optional = parameter.default is not parameter.empty
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"the oracle {name} takes {parameter.name} by position alone", FORMS)
        if parameter.name in REWARD | PREFERENCE or not is_optional:
            names[parameter.name] = not is_optional
    return names


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say of whatever a user's code raises that it was this oracle; the traceback goes into the log."""
    try:
        yield
    except OracleError:
        raise
    except (Exception, SystemExit) as error:  # a user's code raises what it likes
        log.exception("the oracle %s raised", name)
        raise OracleError(f"the oracle {name} raised {type(error).__name__}: {first_line(error)}") from error


class _Function:
    def __init__(self, name: str, function: Callable[..., Any], parameters: Mapping[str, bool]) -> None:
        self._name = name
        self._function = function
        self._parameters = parameters
        self.needs_references = parameters.get("reference", False)

    def _call(self, **values: str | None) -> float:
        """What it answers, NaN for None. Raises OracleError for an exception of its own, or what is no number."""
        given = {name: values[name] for name in self._parameters if name != "reference" or values[name] is not None}
        if self.needs_references and "reference" not in given:
            raise OracleError(
                f"the oracle {self._name} takes a reference, and the data has none", "type --reference-key COLUMN"
            )
        with _told(self._name):
            value = _number(self._function(**given))
        if value is None:
            return math.nan
        if not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise OracleError(f"the oracle {self._name} returned {str(value)[:80]!r}, which is no finite number")
        return float(value)


def _number(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    num_items = value.numel() if hasattr(value, "numel") else getattr(value, "size", None)
    return value.item() if num_items == 1 else value


class _Guarded(Generic[Oracle]):
    """A user's own oracle, whose exceptions are told with its name."""

    def __init__(self, name: str, oracle: Oracle) -> None:
        self._name = name
        self._oracle = oracle
        self.needs_references = oracle.needs_references

    @property
    def num_failures(self) -> int:
        """See :attr:`PreferenceOracle.num_failures`."""
        with _told(self._name):
            return self._oracle.num_failures

    def close(self) -> None:
        """See :meth:`PreferenceOracle.close`."""
        with _told(self._name):
            self._oracle.close()


class GuardedReward(_Guarded[RewardOracle], RewardOracle):
    """A user's own class of rewards."""

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> Floats:
        """See :meth:`RewardOracle.score`."""
        with _told(self._name):
            return checked_scores(self._oracle.score(prompts, responses, references), len(prompts))


class GuardedPreference(_Guarded[PreferenceOracle], PreferenceOracle):
    """A user's own class of preferences."""

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`."""
        with _told(self._name):
            return checked(self._oracle.compare(prompts, first, second, references), len(prompts))


class FunctionReward(_Function, RewardOracle):
    """Calls ``function`` once for each response."""

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> Floats:
        """See :meth:`RewardOracle.score`."""
        answers = references if references is not None else [None] * len(prompts)
        scores = [
            self._call(prompt=prompt, response=response, reference=answer)
            for prompt, response, answer in zip(prompts, responses, answers, strict=True)
        ]
        with np.errstate(over="ignore"):  # then it is infinite, which is refused
            return np.array(scores, np.float32)


class FunctionPreference(_Function, PreferenceOracle):
    """Calls ``function`` once for each pair."""

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        references: Sequence[str] | None = None,
    ) -> Verdicts:
        """See :meth:`PreferenceOracle.compare`."""
        answers = references if references is not None else [None] * len(prompts)
        wins = np.array(
            [
                self._call(prompt=prompt, first=one, second=other, reference=answer)
                for prompt, one, other, answer in zip(prompts, first, second, answers, strict=True)
            ],
            np.float32,
        )
        is_valid = ~np.isnan(wins)
        return Verdicts(first_win=np.where(is_valid, wins, np.float32(0.5)), is_valid=is_valid)

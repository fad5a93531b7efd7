"""Best of N by knockout: the argmax of a reward, and defined where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oatlite.errors import OracleError
from oatlite.oracles.base import Verdicts
from oatlite.oracles.best_of import best_of
from oatlite.testing import FunctionOracle


class Rule:
    """Compares by a function of prompt, first and second, which gives a win probability, or NaN for no verdict."""

    def __init__(self, rule: Callable[[str, str, str], float]) -> None:
        self._rule = rule
        self.asked: list[list[tuple[str, str, str]]] = []
        self.references: list[list[str] | None] = []

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], references: Sequence[str] | None
    ) -> Verdicts:
        self.asked.append(list(zip(prompts, first, second, strict=True)))
        self.references.append(None if references is None else list(references))
        wins = np.array([self._rule(*triple) for triple in self.asked[-1]], np.float32)
        return Verdicts(first_win=wins, is_valid=~np.isnan(wins))


def longer(prompt: str, first: str, second: str) -> float:
    return 0.5 + 0.5 * np.sign(len(first) - len(second))


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5))
def test_with_rewards_it_is_the_first_maximum(rewards: list[list[int]]) -> None:
    responses = [[f"{n}:{reward}" for n, reward in enumerate(each)] for each in rewards]
    oracle = FunctionOracle(lambda prompt, response: float(response.partition(":")[2]))
    found = best_of(oracle.compare, ["p"] * len(responses), responses)
    assert found == [each.index(max(each)) for each in rewards]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_n_responses_take_n_less_one_comparisons_in_as_many_calls_as_rounds(sizes: list[int]) -> None:
    rule = Rule(longer)
    best_of(rule, [f"p{m}" for m in range(len(sizes))], [["x" * (n + 1) for n in range(size)] for size in sizes])
    asked = [prompt for call in rule.asked for prompt, _, _ in call]
    assert [asked.count(f"p{m}") for m in range(len(sizes))] == [size - 1 for size in sizes]
    assert len(rule.asked) == int(np.ceil(np.log2(max(sizes))))


def test_at_a_tie_the_earlier_one_stays() -> None:
    assert best_of(Rule(lambda *_: 0.5), ["p"], [["a", "b", "c", "d", "e"]]) == [0]


def test_without_a_verdict_the_earlier_one_stays() -> None:
    rule = Rule(lambda prompt, first, second: float("nan") if "?" in (first, second) else longer(prompt, first, second))
    assert best_of(rule, ["p", "p"], [["?", "long"], ["a", "?", "bb"]]) == [0, 2]


def test_preferences_that_run_in_a_circle_give_one_of_it() -> None:
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
    rule = Rule(lambda prompt, first, second: float((first, second) in beats))
    assert best_of(rule, ["p"], [["rock", "paper", "scissors"]]) == [2]
    assert best_of(rule, ["p"], [["rock", "scissors", "paper"]]) == [2]


def test_each_match_has_its_prompt_and_its_reference() -> None:
    rule = Rule(longer)
    assert best_of(rule, ["p", "q"], [["a", "bb", "c"], ["a", "bb"]], ["r", "s"]) == [1, 1]
    assert rule.asked == [[("p", "a", "bb"), ("q", "a", "bb")], [("p", "bb", "c")]]
    assert rule.references == [["r", "s"], ["r"]]


def test_an_answer_of_another_length_is_refused() -> None:
    def short(*_: object) -> Verdicts:
        return Verdicts(first_win=np.zeros(1, np.float32), is_valid=np.ones(1, np.bool_))

    with pytest.raises(OracleError, match="2 pairs"):
        best_of(short, ["p"], [["a", "b", "c", "d"]])

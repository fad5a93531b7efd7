"""Python functions as oracles, the checkers that come with them, and several oracles as one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from oatlite.config.schema import Config
from oatlite.errors import ConfigError, OracleError
from oatlite.oracle_checks import try_oracles
from oatlite.oracles import RewardOracle, build_oracle, checked
from oatlite.oracles.checkers import choice, number

SOURCE = """
import math
from oatlite.oracles import PreferenceOracle, RewardOracle, Verdicts

def length(prompt, response): return len(response)
def right(response, reference): return float(response == reference)
def bare(response): return -len(response)
def longer(prompt, first, second): return len(first) > len(second)
def share(first, second, reference=""): return len(first) / (len(first) + len(second))
def optional(response, weight=2.0): return weight * len(response)
def silent(prompt, response): return None if not response else 1.0
def nothing(prompt, first, second): return None if first == "?" else 0.25
def text(prompt, response): return "good"
def infinite(prompt, response): return math.inf
def nan(prompt, first, second): return math.nan
def above(prompt, first, second): return 1.5
def broken(prompt, response): return {}["key"]
def no_arguments(): return 1
def other(question, answer): return 1
def both(response, first, second): return 1
def positional(prompt, /, response): return 1
class Batched(RewardOracle):
    def score(self, prompts, responses, references=None):
        import numpy as np
        return np.array([len(r) for r in responses], np.float32)
class Needy(Batched):
    def __init__(self, url): ...
class Unrelated: ...
class Asks(Batched):
    num_failures = 0
    def close(self):
        from pathlib import Path
        (Path(__file__).parent / "closed").touch()
    def score(self, *arguments):
        self.num_failures += 2
        return super().score(*arguments)
class AsksAboutPairs(PreferenceOracle):
    num_failures = 5
    def compare(self, prompts, first, second, references=None):
        return Verdicts(first_win=[0.5] * len(prompts), is_valid=[True] * len(prompts))
    def close(self): raise OSError("the line is dead")
class Doubles(PreferenceOracle):
    def compare(self, prompts, first, second, references=None):
        import numpy as np
        return Verdicts(first_win=np.array([0.75] * len(prompts)), is_valid=[True] * len(prompts))
class Lists(PreferenceOracle):
    def compare(self, prompts, first, second, references=None): return [1.0] * len(prompts)
class Raises(PreferenceOracle):
    def compare(self, prompts, first, second, references=None): raise KeyError("key")
class Texts(RewardOracle):
    def score(self, prompts, responses, references=None): return "good"
def several(prompt, response):
    import numpy as np
    return np.array([1.0, 2.0])
def huge(prompt, response): return 10**400
def overflow(prompt, response): return 1e300
def leaves(prompt, response):
    import sys
    sys.exit(0)
def numpy_number(prompt, response):
    import numpy as np
    return np.float32(len(response))
def may_refer(prompt, response, reference=None): return 1.0 if reference is None else 0.0
async def later(prompt, response): return 1.0
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def build(mine: str, *names: str, **oracle: object):  # type: ignore[no-untyped-def]
    config = Config.model_validate({"oracle": oracle})
    return build_oracle([f"{mine}:{name}" for name in names], config, device="cpu")


def test_the_parameters_say_what_a_function_is(mine: str) -> None:
    args = (["p", "p"], ["aaa", "b"], ["b", "bb"], ["b", "b"])
    rewards = {name: build(mine, name).compare(*args) for name in ("length", "right", "bare", "optional", "Batched")}
    assert rewards["length"].first_scores.tolist() == [3, 1] and rewards["length"].second_scores.tolist() == [1, 2]
    assert rewards["right"].first_scores.tolist() == [0, 1]
    assert rewards["bare"].first_scores.tolist() == [-3, -1]
    assert rewards["optional"].first_scores.tolist() == [6, 2]
    assert rewards["Batched"].first_scores.tolist() == [3, 1]
    np.testing.assert_allclose(rewards["length"].first_win, 1 / (1 + np.exp([-2.0, 1.0])), rtol=1e-6)
    longer, share = build(mine, "longer").compare(*args), build(mine, "share").compare(*args)
    assert longer.first_win.tolist() == [1, 0] and longer.first_scores is None
    np.testing.assert_allclose(share.first_win, [0.75, 1 / 3], rtol=1e-6)


def test_numbers_of_numpy_count_and_a_reference_with_a_default_may_be_missing(mine: str) -> None:
    assert build(mine, "numpy_number").compare(["p"], ["aaa"], ["b"]).first_scores.tolist() == [3]
    oracle = build(mine, "may_refer")
    assert oracle.compare(["p"], ["a"], ["b"]).first_scores.tolist() == [1]
    assert oracle.compare(["p"], ["a"], ["b"], ["r"]).first_scores.tolist() == [0]
    verdicts = checked(build(mine, "Doubles").compare(["p"], ["a"], ["b"]), 1)
    assert verdicts.first_win.dtype == np.float32 and verdicts.is_valid.dtype == np.bool_


def test_a_class_of_ones_own_is_closed_and_its_failures_are_counted(mine: str) -> None:
    both = build(mine, "Asks", "Batched")
    both.compare(["p"], ["a"], ["b"])
    assert both.num_failures == 2
    both.close()
    assert (Path(mine).parent / "closed").exists()
    alone = build(mine, "AsksAboutPairs")
    assert alone.num_failures == 5
    with pytest.raises(OracleError, match="AsksAboutPairs raised OSError: the line is dead"):
        alone.close()


def test_none_is_no_verdict(mine: str) -> None:
    verdicts = build(mine, "silent").compare(["p", "p"], ["", "a"], ["a", "b"])
    assert verdicts.is_valid.tolist() == [False, True]
    verdicts = build(mine, "nothing").compare(["p", "p"], ["?", "a"], ["a", "b"])
    assert verdicts.is_valid.tolist() == [False, True] and verdicts.first_win.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "returned 'good', which is no finite number"),
        ("infinite", "returned 'inf'"),
        ("nan", "returned 'nan'"),
        ("above", r"outside \[0, 1\]"),
        ("broken", "raised KeyError: 'key'"),
        ("several", r"returned '\[1\. 2\.\]', which is no finite number"),
        ("huge", "which is no finite number"),
        ("overflow", "which is no finite number"),
        ("leaves", "raised SystemExit"),
        ("Lists", "gave a list, not Verdicts"),
        ("Raises", "Raises raised KeyError"),
        ("Texts", "scores that are no numbers"),
    ],
)
def test_an_answer_that_cannot_be_used_ends_training_and_is_refused_at_the_start(
    mine: str, name: str, words: str
) -> None:
    with pytest.raises(OracleError, match=words):
        checked(build(mine, name).compare(["p"], ["a"], ["b"]), 1)
    with pytest.raises(ConfigError, match=words) as caught:
        try_oracles(Config.model_validate({"oracle": {"path": f"{mine}:{name}"}}), "p", "r")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_arguments", "score\\(prompt, response\\)"),
        ("other", r"takes \(answer, question\)"),
        ("both", "score\\(prompt, response\\)"),
        ("positional", "prompt by position alone"),
        ("Needy", "cannot be made: TypeError"),
        ("later", "not async def"),
        ("Unrelated", "no PreferenceOracle"),
        ("missing", "has no missing"),
        ("SOURCE", "has no SOURCE"),
    ],
)
def test_a_wrong_signature_is_one_line(mine: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(mine, name)
    assert "\n" not in str(caught.value)


def test_a_reference_that_the_data_does_not_have_is_told(mine: str) -> None:
    config = Config.model_validate({"oracle": {"path": f"{mine}:right"}})
    try_oracles(config, "p", "r")
    with pytest.raises(ConfigError, match="takes a reference, and the data has none; type --reference-key COLUMN"):
        try_oracles(config, "p", None)


def test_the_oracle_of_evaluation_is_tried_too(mine: str) -> None:
    config = {"oracle": {"path": f"{mine}:length"}, "eval": {"oracle": f"{mine}:broken"}}
    with pytest.raises(ConfigError, match="raised KeyError"):
        try_oracles(Config.model_validate(config), "p", "r")


def test_several_rewards_are_added_with_their_weights(mine: str) -> None:
    args = (["p"] * 3, ["aaa", "b", ""], ["b", "bbbb", "c"])
    both = build(mine, "length", "bare", weights=[0.75, 0.25])
    assert isinstance(both, RewardOracle)
    np.testing.assert_allclose(both.compare(*args).first_scores, [1.5, 0.5, 0])
    np.testing.assert_allclose(build(mine, "length", "bare").compare(*args).first_scores, [0, 0, 0])
    partly = build(mine, "length", "silent").compare(*args)
    assert partly.is_valid.tolist() == [True, True, False], "what one of them cannot score has no verdict"
    with pytest.raises(ConfigError, match="longer only compares"):
        build(mine, "length", "longer")


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("so it is 42.", "42", 1.0),
        ("first 7, then 42", "42", 1.0),
        ("42, then 7", "42", 0.0),
        ("The answer is 42, as 7 * 6 shows", "42", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("1234.0", "reasons 5 6 #### 1,234", 1.0),
        (r"thus \boxed{3/4} or 9", "0.75", 1.0),
        (r"\boxed{1} no, \boxed{2}", "2", 1.0),
        (r"\boxed{\frac{1}{2}}", "1/2", 1.0),
        (r"\boxed{\frac{1}{2}}", "2", 0.0),
        (r"so \(x = -\dfrac{3}{4}\)", "-0.75", 1.0),
        ("4", r"thus \frac{8}{2}", 1.0),
        ("half: 50%", "0.5", 1.0),
        ("1e3", "1000", 1.0),
        ("-3", "3", 0.0),
        ("0.3333333", "1/3", 1.0),
        ("0.3333", "1/3", 0.0),
        ("", "3", 0.0),
        ("none", "3", 0.0),
        ("3", "three", None),
        ("1/0", "3", 0.0),
        ("answer: maybe. 3", "3", 1.0),
        ("²", "2", 0.0),
        ("1e999999999", "3", 0.0),
        ("9" * 100_000, "3", 0.0),
        ("1/" + "0" * 70 + "1", "1", 0.0),
    ],
)
def test_numbers_are_found_and_compared(response: str, reference: str, expected: float | None) -> None:
    assert number(response, reference) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("B", "B", 1.0),
        ("(B)", "B.", 1.0),
        ("I think that A is wrong, so the answer is (C).", "C", 1.0),
        ("The answer: C because A and B fail", "C", 1.0),
        (r"\boxed{D}", "(D)", 1.0),
        ("A", "B", 0.0),
        (" A.\n", "A", 1.0),
        ("A dog is nice", "A", 0.0),
        ("What I like", "I", 0.0),
        ("It must be (A), I think", "A", 1.0),
        ("answer: A", "A", 1.0),
        ("The answer is a dog, (A)", "A", 1.0),
        ("", "B", 0.0),
        ("Both", "B", 0.0),
        ("b", "B", 0.0),
        ("B", "none", None),
    ],
)
def test_letters_are_found_and_compared(response: str, reference: str, expected: float | None) -> None:
    assert choice(response, reference) == expected


def test_the_checkers_are_oracles_by_their_names() -> None:
    oracle = build_oracle(["oatlite.oracles.checkers:number"], Config(), device="cpu")
    verdicts = oracle.compare(["2 + 2", "?"], ["4", "1"], ["5", "2"], ["4", "none"])
    assert verdicts.is_valid.tolist() == [True, False]
    assert verdicts.first_win[0] == pytest.approx(1 / (1 + math.exp(-1)))

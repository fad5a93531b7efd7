"""The demo's task: its facts can be read back, and its true score is what it says."""

from __future__ import annotations

import random

import pytest

from oatlite.demo import task

POSTS = [task.make_post(random.Random(seed)) for seed in range(200)]


def full(post: task.Post) -> str:
    facts = post.facts
    return (
        f" My {facts['who']} {facts['problem']} my {facts['item']} at the {facts['place']} and I want {facts['want']}."
    )


def test_facts_are_read_back_from_the_text_alone() -> None:
    for post in POSTS:
        assert task.read_facts(post.prompt) == dict(post.facts)


def test_a_full_summary_scores_one_and_each_missing_fact_costs_a_fifth() -> None:
    for post in POSTS:
        assert task.true_score(post.prompt, full(post)) == pytest.approx(1.0)
        without_wish = full(post).partition(" and I want")[0] + "."
        assert task.true_score(post.prompt, without_wish) == pytest.approx(0.8)


def test_a_wrong_fact_costs_more_than_a_missing_one() -> None:
    for post in POSTS:
        wrong = next(place for place in task.PLACES if place != post.facts["place"])
        text = full(post).replace(f"at the {post.facts['place']}", f"at the {wrong}")
        assert task.true_score(post.prompt, text) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "at_most"),
    [
        (lambda text: text.replace(".", " to be honest."), 0.9),
        (lambda text: text.rstrip("."), 0.9),
        (lambda text: text.replace(".", "") + text[1:], 0.8),
        (lambda text: "", 0.0),
        (lambda text: " It rained all day.", 0.0),
    ],
    ids=["filler", "no full stop", "said twice", "empty", "off the point"],
)
def test_what_makes_a_summary_worse_lowers_its_score(change, at_most: float) -> None:  # type: ignore[no-untyped-def]
    for post in POSTS[:50]:
        assert task.true_score(post.prompt, change(full(post))) <= at_most + 1e-9


def test_references_are_of_mixed_quality() -> None:
    rows = task.make_rows(500, seed=1)
    scores = [task.true_score(row["prompt"], row["reference"]) for row in rows]
    assert 0.3 < sum(scores) / len(scores) < 0.7
    assert 0.02 < sum(score > 0.99 for score in scores) / len(scores) < 0.2
    assert all(row["reference"].startswith(" ") for row in rows)


def test_rows_repeat_by_seed() -> None:
    assert task.make_rows(20, seed=3) == task.make_rows(20, seed=3)
    assert task.make_rows(20, seed=3) != task.make_rows(20, seed=4)


def test_judged_candidates_carry_the_true_score() -> None:
    for post in task.make_judged(30, 6, seed=0):
        assert len(post["responses"]) == 6
        for response, score in zip(post["responses"], post["scores"], strict=True):
            assert score == task.true_score(post["prompt"], response)

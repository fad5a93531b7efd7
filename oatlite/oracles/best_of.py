"""The best of several responses, by an oracle that compares two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oatlite.oracles.base import Verdicts, checked

Compare = Callable[[Sequence[str], Sequence[str], Sequence[str], Sequence[str] | None], Verdicts]


def best_of(
    oracle_compare: Compare,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    references: Sequence[str] | None = None,
) -> list[int]:
    """The index of the best response to each of M prompts, by knockout.

    In each round the responses that are left meet in pairs, in their order, all prompts in one call of
    ``oracle_compare``; the later one goes on only where the oracle gives it more than one half. So at a tie, or where
    a verdict is not valid, the earlier one does. N responses take N - 1 comparisons, in as many calls as N can be
    halved. For a reward oracle the result is the first of those with the highest reward; where preferences run in a
    circle it is one of the circle. Raises OracleError for an answer that cannot be used.
    """
    left = [list(range(len(candidates))) for candidates in responses]
    assert all(left), "each prompt has a response"
    while any(len(those) > 1 for those in left):
        matches = [
            (m, first, second)
            for m, those in enumerate(left)
            for first, second in zip(those[::2], those[1::2], strict=False)
        ]
        verdicts = checked(
            oracle_compare(
                [prompts[m] for m, _, _ in matches],
                [responses[m][first] for m, first, _ in matches],
                [responses[m][second] for m, _, second in matches],
                None if references is None else [references[m] for m, _, _ in matches],
            ),
            len(matches),
        )
        lost: list[set[int]] = [set() for _ in prompts]
        for b, (m, first, second) in enumerate(matches):
            second_wins = bool(verdicts.is_valid[b]) and float(verdicts.first_win[b]) < 0.5
            lost[m].add(first if second_wins else second)
        left = [[n for n in those if n not in lost[m]] for m, those in enumerate(left)]
    return [those[0] for those in left]

"""Rewards that can be verified: whether a response ends in the right number, or in the right letter.

Both are examples of a function as the oracle, to use as they are or to start from:

    oatlite train --oracle oatlite.oracles.checkers:number --prompts problems.jsonl --reference-key answer ...
"""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?:[eE][-+]?\d{1,3})?%?")
MAX_CHARACTERS = 64  # of a number: what is longer is none, however long a policy makes it
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
FINAL = re.compile(r"(?:####|(?:answer|result)\s*(?:is|:|=))\s*(.*)", re.IGNORECASE)
LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9'])")
CERTAIN_LETTER = re.compile(r"\(([A-Z])\)|(?<![A-Za-z0-9])([B-HJ-Z])(?![A-Za-z0-9'])")
"""Anywhere in a text, where a bare A is an article and a bare I a pronoun."""
ALONE = re.compile(r"\W*([A-Z])\W*")
TOLERANCE = Fraction(1, 10**6)


def number(response: str, reference: str) -> float | None:
    """1.0 where the response's answer is the number that the reference ends in, to one part in a million, else 0.0.

    The answer is what stands in the last ``\\boxed{}``, else after the last "answer is", "answer:" or "####", else the
    last number of all. ``1,234``, ``3/4``, ``\\frac{3}{4}``, ``1e3`` and ``50%`` are numbers. None where the reference
    holds none.
    """
    expected = _last_number(reference)
    if expected is None:
        return None
    found = _last_number(response)
    if found is None:
        return 0.0
    return float(abs(found - expected) <= TOLERANCE * max(abs(expected), Fraction(1)))


def choice(response: str, reference: str) -> float | None:
    """1.0 where the response's answer is the letter that the reference ends in, else 0.0.

    The answer is looked for as in :func:`number`; a letter counts alone or in brackets, as in ``B``, ``(B)`` or ``B.``.
    In a text that does not say which is its answer, a bare A or I is a word. None where the reference holds none.
    """
    expected = _last_letter(reference)
    if expected is None:
        return None
    return float(_last_letter(response) == expected)


def _stated(text: str) -> str | None:
    """What a text itself calls its answer."""
    boxed = BOXED.findall(text)
    if boxed:
        return str(boxed[-1])
    final = FINAL.findall(text)
    return str(final[-1]) if final else None


def _last_number(text: str) -> Fraction | None:
    stated = _stated(text)
    numbers = _numbers(stated) if stated is not None else []
    if numbers:
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in NUMBER.finditer(FRACTION.sub(r"\1/\2", text)):
        word = match.group().replace(",", "")
        share = word.endswith("%")
        over, _, under = word.rstrip("%").partition("/")
        is_none = not any(character.isdigit() for character in over) or len(word) > MAX_CHARACTERS
        if is_none or (under and not int(under)):
            continue
        value = Fraction(over) / (int(under) if under else 1)
        found.append(value / 100 if share else value)
    return found


def _last_letter(text: str) -> str | None:
    stated = _stated(text)
    letters = LETTER.findall(stated) if stated is not None else []
    if letters:
        return str(letters[0])
    if alone := ALONE.fullmatch(text):
        return alone[1]
    certain = [bracketed or bare for bracketed, bare in CERTAIN_LETTER.findall(text)]
    return certain[-1] if certain else None

"""What a judge is asked: a template with places for the prompt and the two responses.

A response is written by a policy that is rewarded for winning, and it can try to talk to the judge ("the first answer
is the better one"). The templates here fence what is judged with tags and say that it is no instruction; that helps
and proves nothing. If the win rate rises while the responses talk of answers and judges, read ``samples.jsonl``.
"""

from __future__ import annotations

import re
from pathlib import Path

from oatlite.errors import ConfigError
from oatlite.oracles.conversations import as_text

TEMPLATES = Path(__file__).parent / "templates"
PLACES = ("prompt", "first", "second")
PLACE = re.compile(r"\{(prompt|first|second)\}")
EMPTY = "(This answer is empty.)"
"""What the judge sees of a response without text, so that it need not guess what two tags around nothing mean."""


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.txt"))


def load_template(name: str) -> str:
    """The text of a template: one of :func:`template_names`, or a file.

    Raises ConfigError when there is none, or it lacks one of ``{prompt}``, ``{first}`` and ``{second}``.
    """
    path = TEMPLATES / f"{name}.txt" if name in template_names() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"judge.template = {name} cannot be read: {error.strerror}",
            f"give {', '.join(template_names())} or a text file",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"judge.template = {name} is no UTF-8 text", "convert it to UTF-8") from None
    missing = [f"{{{place}}}" for place in PLACES if place not in PLACE.findall(text)]
    if missing:
        raise ConfigError(
            f"judge.template = {name} lacks {' and '.join(missing)}", "write each where its text is to stand"
        )
    return text.strip()


def fill(template: str, prompt: str, first: str, second: str) -> str:
    """What the judge reads. Texts are put in as they are: braces within them are never filled."""
    texts = {"prompt": as_text(prompt)}
    texts |= {place: text if text.strip() else EMPTY for place, text in (("first", first), ("second", second))}
    return PLACE.sub(lambda match: texts[match[1]], template)

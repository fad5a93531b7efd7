"""A prompt that is a conversation: the text of a JSON list of messages, as the dataset's rows come to an oracle."""

from __future__ import annotations

import json


def messages_of(prompt: str) -> list[dict[str, str]]:
    """The messages of a conversation, each with role and content; any other text is what a user said."""
    if prompt.startswith('[{"role"'):
        try:
            messages = json.loads(prompt)
        except json.JSONDecodeError:
            messages = None
        if isinstance(messages, list) and all(isinstance(m, dict) and set(m) == {"role", "content"} for m in messages):
            return messages
    return [{"role": "user", "content": prompt}]


def as_text(prompt: str) -> str:
    """A conversation as a person would write it down, a paragraph a turn; a single question as it is."""
    messages = messages_of(prompt)
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)

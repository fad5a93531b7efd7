"""Addresses of servers, as a person types them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from oatlite.config.flags import to_type
from oatlite.errors import ConfigError


def check_address(key: str, url: str) -> None:
    """Raise ConfigError, naming the option ``key``, for what is no http address, or one that holds a secret."""
    fix = f"type {to_type(key, 'http://HOST:PORT')}"
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is read, and may be none, only now
    except ValueError as error:
        raise ConfigError(f"{key} = {url} is no web address: {error}", fix) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise ConfigError(f"{key} = {url} is no web address", fix)
    if parts.username is not None or parts.query:
        what = "a password" if parts.username is not None else "a query"
        raise ConfigError(
            f"{key} holds {what}, and is written into the run's configuration", "give secrets by the environment alone"
        )

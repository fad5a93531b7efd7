"""Addresses of servers, as a person types them."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from oatlite.config.flags import to_type
from oatlite.errors import ConfigError


def check_address(key: str, url: str) -> None:
    """Raise ConfigError, naming the option ``key``, for what is no http address, or one that holds a secret."""
    fix = f"type {to_type(key, 'http://HOST:PORT')}"
    shown = re.sub(r"//[^/]*@", "//***@", url)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
        if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host):
            ipaddress.IPv4Address(host)
        port = parts.port  # which is read, and may be none, only now
    except ValueError as error:
        raise ConfigError(f"{key} = {shown} is no web address: {error}", fix) from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"\s", url):
        raise ConfigError(f"{key} = {shown} is no web address", fix)
    if parts.username is not None or parts.query:
        what = "a password" if parts.username is not None else "a query"
        raise ConfigError(
            f"{key} holds {what}, and is written into the run's configuration", "give secrets by the environment alone"
        )

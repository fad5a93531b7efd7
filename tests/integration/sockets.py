"""What processes have open, by /proc, and whom their internet sockets listen to."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path

LISTENING = "0A"
CONNECTED = "01"


def opened(process: Path) -> set[str]:
    """What its descriptors lead to."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(descriptor))
    return found


def sockets_of(members: list[Path]) -> set[str]:
    """Inode numbers."""
    names = {name for entry in members for name in opened(entry)}
    return {match[1] for name in names if (match := re.fullmatch(r"socket:\[(\d+)\]", name))}


def bound_by(inodes: set[str]) -> set[tuple[str, str]]:
    """(protocol, address) of the internet sockets among ``inodes`` that wait for whoever comes."""
    found = set()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            # A datagram socket that is bound takes what comes, unless it is connected.
            if inode in inodes and (state == LISTENING if protocol.startswith("tcp") else state != CONNECTED):
                found.add((protocol, address_of(local.partition(":")[0])))
    return found


def address_of(digits: str) -> str:
    """Of /proc/net: words of 32 bits in the machine's order."""
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def beyond_this_machine(bound: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of what :func:`bound_by` gives that other machines can speak to."""
    return {(protocol, where) for protocol, where in bound if not ipaddress.ip_address(where).is_loopback}

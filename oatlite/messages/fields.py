"""What a field of a message may hold: each declares its type and its limits, which both ends check."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_FRAME_BYTES = 1 << 30
MAX_ITEMS = 1 << 20


class MalformedMessage(ValueError):
    """Frames that are no message of ours, or break a declared limit."""


@dataclass(frozen=True, slots=True)
class Text:
    max_bytes: int

    def check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise MalformedMessage("expected text")
        try:
            num_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise MalformedMessage("expected text without lone surrogates") from None
        if num_bytes > self.max_bytes:
            raise MalformedMessage(f"expected text of at most {self.max_bytes} bytes, got {num_bytes}")


@dataclass(frozen=True, slots=True)
class Texts:
    max_items: int
    each: Text

    def check(self, value: Any) -> None:
        if not isinstance(value, list) or len(value) > self.max_items:
            raise MalformedMessage(f"expected a list of at most {self.max_items} texts")
        for item in value:
            self.each.check(item)


@dataclass(frozen=True, slots=True)
class Int:
    low: int
    high: int

    def check(self, value: Any) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            raise MalformedMessage(f"expected an integer in [{self.low}, {self.high}]")


@dataclass(frozen=True, slots=True)
class Float:
    low: float
    high: float

    def check(self, value: Any) -> None:
        if type(value) is not float or not math.isfinite(value) or not self.low <= value <= self.high:
            raise MalformedMessage(f"expected a finite float in [{self.low}, {self.high}]")


@dataclass(frozen=True, slots=True)
class Flag:
    def check(self, value: Any) -> None:
        if type(value) is not bool:
            raise MalformedMessage("expected a boolean")


@dataclass(frozen=True, slots=True)
class Array:
    dtype: str
    max_bytes: int = MAX_FRAME_BYTES

    def check(self, value: Any) -> None:
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != np.dtype(self.dtype):
            raise MalformedMessage(f"expected a one-dimensional array of {self.dtype}")
        if value.nbytes > self.max_bytes:
            raise MalformedMessage(f"expected at most {self.max_bytes} bytes, got {value.nbytes}")


Spec = Text | Texts | Int | Float | Flag | Array


def _declared(spec: Spec) -> Any:
    return field(metadata={"spec": spec})


def text(max_bytes: int = 256) -> Any:
    return _declared(Text(max_bytes))


def texts(max_items: int = MAX_ITEMS, max_bytes: int = 1 << 20) -> Any:
    return _declared(Texts(max_items, Text(max_bytes)))


def integer(low: int = 0, high: int = 2**62) -> Any:
    return _declared(Int(low, high))


def real(low: float = -math.inf, high: float = math.inf) -> Any:
    return _declared(Float(low, high))


def flag() -> Any:
    return _declared(Flag())


def array(dtype: str) -> Any:
    return _declared(Array(dtype))

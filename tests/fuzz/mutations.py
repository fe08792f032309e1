"""Damage real inputs: bytes, and JSON and msgpack values that stay encodable but are not what a reader expects.

A random generator decides on every change, so that a number stands for an input.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

Make = Callable[[random.Random], bytes]

_HEADERS = re.compile(rb"PK[\x01\x03\x05]|\x93NUMPY|\x80[\x02-\x05]")  # of zip members, arrays and pickles
_HEADER_BYTES = 64


def mutated(*seeds: bytes, page_bytes: int = 0) -> Make:
    """One of the inputs with one to four changes, half of them near a header or, if given, near the start of a page."""
    headers = {
        seed: range(0, len(seed), page_bytes) if page_bytes else [match.start() for match in _HEADERS.finditer(seed)]
        for seed in seeds
    }

    def make(generator: random.Random) -> bytes:
        seed = generator.choice(seeds)
        data = bytearray(seed)
        for _ in range(generator.choice((1, 1, 2, 4))):
            place = generator.randrange(len(data) + 1)
            if headers[seed] and generator.random() < 0.5:
                place = min(len(data), generator.choice(headers[seed]) + generator.randrange(_HEADER_BYTES))
            _change_bytes(generator, data, place, generator.choice(seeds))
        return bytes(data)

    return make


def then(make: Make, change: Callable[[bytes], bytes]) -> Make:
    """The input after a change."""
    return lambda generator: change(make(generator))


def either(*makes: Make) -> Make:
    """An input of one of the kinds."""
    return lambda generator: generator.choice(makes)(generator)


def _change_bytes(generator: random.Random, data: bytearray, place: int, other: bytes) -> None:
    """Replace bytes at ``place`` by a number, a flipped bit, random bytes, a block of either input, or nothing."""
    start, size, width = generator.randrange(len(other)), 1 << generator.randint(0, 12), generator.choice((1, 2, 4, 8))
    here = int.from_bytes(data[place : place + width], "little")
    number = generator.choice((0, len(data), here, 1 << generator.randint(0, 8 * width))) + generator.randint(-2, 2)
    number_bytes = (number % (1 << 8 * width)).to_bytes(width, generator.choice(("little", "big")))
    flipped = (here ^ 1 << generator.randrange(8 * width)).to_bytes(width, "little")
    replaced, by = generator.choice(
        (
            *((width, new) for new in (number_bytes, number_bytes, flipped, flipped, generator.randbytes(width))),
            *((size, new) for new in (other[start : start + size], b"", generator.choice((b"\0", b"\xff", b" ")) * size)),
            *((0, new) for new in (generator.randbytes(width), bytes(data[place : place + size]))),
            (len(data), b""),
        )
    )
    data[place : place + replaced] = by


class _Twin(str):
    """A key that may stand in a dictionary beside an equal one, so that it is written twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


# What json.dumps cannot write replaces these marks in the text.
_RAW = {
    "@deep lists@": "[" * 100_000 + "]" * 100_000,
    "@lists@": "[" * 900 + "]" * 900,
    "@maps@": '{"a":' * 900 + "1" + "}" * 900,
    "@digits@": "9" * 5000,
    "@exponent@": "1e400",
    "@half a pair@": '"\\ud800"',
    "@nothing@": "",
}
_VALUES = (
    *(None, True, False, -1, 0, 1, 2, 100, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63)),
    *(0.5, 640.0, float("nan"), float("inf"), -1e308),
    *("", "a", "640", "../../x", "\x00", "\ud800", "é" * 600, "x" * 5000, "\u2028"),
    *([], {}, [0], ["a"], [1, 2], [[]], {"a": 1}, {"": ""}, [0] * 5000),
)
_OF_JSON = (*_VALUES, 10**40, *_RAW)
_OF_MSGPACK = (*_VALUES, b"", b"\xff" * 9, msgpack.ExtType(1, b""), msgpack.ExtType(127, b"abcd"), msgpack.Timestamp(1))


def json_like(*values: Any) -> Make:
    """The text of one of the JSON values after some changes."""

    def make(generator: random.Random) -> bytes:
        text = json.dumps(_changed(generator, values, _OF_JSON))
        for mark, raw in _RAW.items():
            text = text.replace(json.dumps(mark), raw)
        return text.encode()

    return make


def msgpack_like(*values: Any) -> Make:
    """One of the values as msgpack after some changes."""
    return lambda generator: msgpack.packb(_changed(generator, values, _OF_MSGPACK), unicode_errors="surrogatepass")


def json_damaged(value: Any) -> Make:
    """A JSON value changed in its values or in its text."""
    return either(json_like(value), mutated(json.dumps(value).encode()))


def _changed(generator: random.Random, values: Sequence[Any], others: Sequence[Any]) -> Any:
    value = generator.choice(values)
    for _ in range(generator.randint(1, 3)):
        value = _change_value(generator, value, others)
    return value


def _change_value(generator: random.Random, value: Any, others: Sequence[Any]) -> Any:
    """The value with a part of it replaced or removed, or with a key renamed or doubled."""
    if not value or not isinstance(value, (dict, list)) or generator.random() < 0.2:
        return generator.choice(others)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    index = generator.randrange(len(items))
    key, part = items[index]
    kind = generator.choice((*["change"] * 6, "remove", "rename", "double"))
    changed = {
        "change": [(key, _change_value(generator, part, others))],
        "remove": [],
        "rename": [(str(generator.choice(_VALUES)), part)],
        "double": [(key, part), (_Twin(key), generator.choice((part, *others)))],
    }
    items[index : index + 1] = changed[kind]
    return dict(items) if isinstance(value, dict) else [part for _, part in items]

"""Damage real inputs: bytes, and JSON and msgpack that stay well formed, or nearly, but are not what a reader expects.

A random generator decides on every change, so that a number stands for an input.
"""

from __future__ import annotations

import copy
import json
import pickletools
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

Make = Callable[[random.Random], bytes]


class Seed(NamedTuple):
    """A real input, and the position and width of numbers in it that a reader might trust."""

    data: bytes
    fields: Sequence[tuple[int, int]] = ()

    @classmethod
    def zip(cls, data: bytes) -> Seed:
        """The numbers in the headers, each of which follows a signature."""
        headers = {b"PK\x03\x04": "HHHHHIIIHH", b"PK\x01\x02": "HHHHHHIIIHHHHHII", b"PK\x05\x06": "HHHHIIH"}
        found = [(match.end(), codes) for sign, codes in headers.items() for match in re.finditer(re.escape(sign), data)]
        return cls(data, [field for place, codes in found for field in _struct(place, codes)])

    @classmethod
    def npy(cls, data: bytes) -> Seed:
        """The letters of the header, and the numbers of the pickle if there is one."""
        end = data.index(b"\n") + 1
        return cls(data, [(place, 1) for place in range(end)] + (pickle_fields(data, end) if b"|O" in data[:end] else []))

    @classmethod
    def lmdb(cls, data: bytes, page_bytes: int = 4096) -> Seed:
        """The numbers in meta pages, page headers, offsets and nodes."""
        fields = [field for meta in (0, page_bytes) for field in _struct(meta + 16, "IIQQIHHQQQQQIHHQQQQQQQ")]
        for page in range(0, len(data), page_bytes):
            fields += _struct(page, "QHHHH")
            if page > page_bytes and data[page + 10] in (1, 2):  # a branch or a leaf
                (lower,) = struct.unpack_from("<H", data, page + 12)
                for place in range(page + 16, page + lower, 2):
                    node = page + struct.unpack_from("<H", data, place)[0]
                    key_bytes = struct.unpack_from("<H", data, node + 6)[0]
                    fields += [(place, 2), *_struct(node, "HHHH"), (node + 8 + key_bytes, 8)]
        return cls(data, fields)


def _struct(start: int, codes: str) -> list[tuple[int, int]]:
    """The fields of a packed struct."""
    return [(start + struct.calcsize(f"<{codes[:index]}"), struct.calcsize(code)) for index, code in enumerate(codes)]


def pickle_fields(data: bytes, start: int = 0) -> list[tuple[int, int]]:
    """The instructions of the pickle at ``start``, and the lengths and numbers after them."""
    places = [start + (place or 0) for _, _, place in pickletools.genops(data[start:])]
    return [(place + step, width) for place in places for step, width in ((0, 1), (1, 1), (1, 4))]


def mutated(seeds: Sequence[Seed]) -> Make:
    """One of the inputs with one to four changes."""

    def make(generator: random.Random) -> bytes:
        seed = generator.choice(seeds)
        data = bytearray(seed.data)
        for _ in range(generator.choice((1, 1, 2, 4))):
            if seed.fields and generator.random() < 0.5:
                _set_number(generator, data, *generator.choice(seed.fields))
            elif data:
                _change_bytes(generator, data, generator.choice(seeds).data)
        return bytes(data)

    return make


def then(make: Make, change: Callable[[bytes], bytes]) -> Make:
    """The input after a change."""
    return lambda generator: change(make(generator))


def either(*makes: Make) -> Make:
    """An input of one of the kinds."""
    return lambda generator: generator.choice(makes)(generator)


def _set_number(generator: random.Random, data: bytearray, place: int, width: int) -> None:
    """Write a number on which readers of lengths and counts stumble, or change the present one."""
    order = generator.choice(("little", "big"))
    here = int.from_bytes(data[place : place + width], order)
    power = 1 << generator.randint(0, 8 * width)
    near = generator.choice((0, len(data), power, here)) + generator.randint(-2, 2)
    number = generator.choice((near, here ^ power, generator.getrandbits(8 * width)))
    data[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, order)


def _block(generator: random.Random, data: bytes | bytearray) -> slice:
    start = generator.randrange(len(data))
    return slice(start, start + (1 << generator.randint(0, 12)))


def _change_bytes(generator: random.Random, data: bytearray, other: bytes) -> None:
    place, block = generator.randrange(len(data)), _block(generator, data)
    kind = generator.choice(("number", "bit", "cut", "insert", "delete", "duplicate", "overwrite", "splice", "fill"))
    if kind == "number":
        _set_number(generator, data, place, generator.choice((1, 2, 4, 8)))
    elif kind == "bit":
        data[place] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = generator.randbytes(generator.randint(1, 16))
    elif kind == "delete":
        del data[block]
    elif kind == "duplicate":
        data[place:place] = data[block]
    elif kind == "overwrite":
        data[place : place + len(data[block])] = data[block]
    elif kind == "splice":
        data[block] = other[_block(generator, other)]
    else:
        data[block] = generator.choice((b"\0", b"\xff", b" ")) * len(data[block])


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


def json_like(values: Sequence[Any]) -> Make:
    """The text of one of the JSON values after some changes."""

    def make(generator: random.Random) -> bytes:
        text = json.dumps(_changed(generator, values, _OF_JSON))
        for mark, raw in _RAW.items():
            text = text.replace(json.dumps(mark), raw)
        return text.encode()

    return make


def msgpack_like(values: Sequence[Any]) -> Make:
    """One of the values as msgpack after some changes."""
    return lambda generator: msgpack.packb(_changed(generator, values, _OF_MSGPACK), unicode_errors="surrogatepass")


def json_damaged(value: Any) -> Make:
    """A JSON value changed in its values or in its text."""
    return either(json_like([value]), mutated([Seed(json.dumps(value).encode())]))


def _changed(generator: random.Random, values: Sequence[Any], others: Sequence[Any]) -> Any:
    """One of the values with parts of it replaced, moved, repeated or removed, and with keys renamed or doubled."""
    root = [copy.deepcopy(generator.choice(values))]
    for _ in range(generator.randint(1, 3)):
        _change_value(generator, root, generator.choice(others))
    return root[0]


def _change_value(generator: random.Random, root: list[Any], other: Any) -> None:
    places = list(_places(root))
    holder, key = generator.choice(places)
    kind = generator.choice(("replace", "move", "remove", "rename", "repeat"))
    if kind == "move":
        elsewhere, other_key = generator.choice(places)
        holder[key] = copy.deepcopy(elsewhere[other_key])
    elif kind == "remove" and holder is not root:
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(generator.choice(_VALUES))] = holder.pop(key)
    elif kind == "repeat" and isinstance(holder, dict):
        holder[_Twin(key)] = copy.deepcopy(other)
    elif kind == "repeat" and holder is not root:
        holder[key:key] = [copy.deepcopy(holder[key])]
    else:
        holder[key] = copy.deepcopy(other)


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value, (list or dictionary, index or key), the whole value first."""
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], (list, dict)):
            yield from _places(holder[key])

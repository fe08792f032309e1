"""Strategies of Hypothesis that damage real inputs.

Hypothesis chooses the seed of a generator, which decides the rest: when each detail was drawn from Hypothesis, inputs took ten
times as long to make, and six of ten had been there before.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

GENERATORS = st.randoms(use_true_random=True)


@dataclass(frozen=True)
class Seed:
    """A real input, and where in it are the numbers that a reader might trust: (place, bytes) of each."""

    data: bytes
    fields: Sequence[tuple[int, int]] = ()


def mutated(seeds: Sequence[Seed]) -> st.SearchStrategy[bytes]:
    """One of the inputs with one to four changes."""

    def damaged(generator: random.Random) -> bytes:
        seed = generator.choice(seeds)
        data = bytearray(seed.data)
        for _ in range(generator.choice((1, 1, 2, 4))):
            if seed.fields and generator.random() < 0.5:
                _set_number(generator, data, *generator.choice(seed.fields))
            elif data:
                generator.choice(_CHANGES)(generator, data, generator.choice(seeds).data)
        return bytes(data)

    return GENERATORS.map(damaged)


def _set_number(generator: random.Random, data: bytearray, place: int, width: int) -> None:
    """Write a number that readers of lengths and counts stumble over, or change the one that is there."""
    order = generator.choice(("little", "big"))
    here = int.from_bytes(data[place : place + width], order)
    power = 1 << generator.randint(0, 8 * width)
    near = generator.choice((0, len(data), power, here)) + generator.randint(-2, 2)
    number = generator.choice((near, here ^ power, generator.getrandbits(8 * width)))
    data[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, order)


def _block(generator: random.Random, data: bytes | bytearray) -> slice:
    start = generator.randrange(len(data))
    return slice(start, start + (1 << generator.randint(0, 12)))


def _change_number(generator: random.Random, data: bytearray, other: bytes) -> None:
    _set_number(generator, data, generator.randrange(len(data)), generator.choice((1, 2, 4, 8)))


def _flip_bit(generator: random.Random, data: bytearray, other: bytes) -> None:
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _cut(generator: random.Random, data: bytearray, other: bytes) -> None:
    del data[generator.randrange(len(data)) :]


def _insert(generator: random.Random, data: bytearray, other: bytes) -> None:
    place = generator.randrange(len(data) + 1)
    data[place:place] = generator.randbytes(generator.randint(1, 16))


def _delete(generator: random.Random, data: bytearray, other: bytes) -> None:
    del data[_block(generator, data)]


def _duplicate(generator: random.Random, data: bytearray, other: bytes) -> None:
    place = generator.randrange(len(data) + 1)
    data[place:place] = data[_block(generator, data)]


def _overwrite(generator: random.Random, data: bytearray, other: bytes) -> None:
    block = data[_block(generator, data)]
    place = generator.randrange(len(data))
    data[place : place + len(block)] = block


def _splice(generator: random.Random, data: bytearray, other: bytes) -> None:
    data[_block(generator, data)] = other[_block(generator, other)]


def _fill(generator: random.Random, data: bytearray, other: bytes) -> None:
    block = _block(generator, data)
    data[block] = generator.choice((b"\0", b"\xff", b" ")) * len(data[block])


_Change = Callable[[random.Random, bytearray, bytes], None]
_CHANGES: tuple[_Change, ...] = (
    _change_number, _flip_bit, _cut, _insert, _delete, _duplicate, _overwrite, _splice, _fill,
)  # fmt: skip


def zip_seed(data: bytes) -> Seed:
    """A zip file; its numbers are those of its headers, each of which follows a signature."""
    headers = {b"PK\x03\x04": "HHHHHIIIHH", b"PK\x01\x02": "HHHHHHIIIHHHHHII", b"PK\x05\x06": "HHHHIIH"}
    fields = []
    for signature, codes in headers.items():
        for found in re.finditer(re.escape(signature), data):
            place = found.end()
            for code in codes:
                fields.append((place, struct.calcsize(code)))
                place += struct.calcsize(code)
    return Seed(data, fields)

"""Strategies of Hypothesis for JSON and msgpack that are well formed, or nearly, and not what a reader expects."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
from hypothesis import strategies as st

from tests.fuzz.mutations import GENERATORS


class _Twin(str):
    """A key that may stand in a dictionary beside an equal one, so that it is written twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


# What json.dumps cannot write is put in as text, in place of these marks.
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


def json_like(values: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """The text of one of the JSON values after some changes."""
    return GENERATORS.map(lambda generator: _write_json(_changed(generator, values, _OF_JSON)))


def _write_json(value: Any) -> bytes:
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def msgpack_like(values: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """One of the values as msgpack after some changes."""
    return GENERATORS.map(
        lambda generator: bytes(msgpack.packb(_changed(generator, values, _OF_MSGPACK), unicode_errors="surrogatepass"))
    )


def _changed(generator: random.Random, values: Sequence[Any], others: Sequence[Any]) -> Any:
    """One of the values with parts of it replaced, moved, repeated or taken out, and with keys renamed or doubled."""
    root = [copy.deepcopy(generator.choice(values))]
    for _ in range(generator.randint(1, 3)):
        _change(generator, root, generator.choice(others))
    return root[0]


def _change(generator: random.Random, root: list[Any], other: Any) -> None:
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
    """Every place in a value, (list or dictionary, index or key), the whole of it first."""
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], (list, dict)):
            yield from _places(holder[key])

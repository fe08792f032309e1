"""The plain values in a pickle, without running the pickle: some detectors' files hold their boxes or confidences in one.

A pickle is a program for a machine with a stack. The machine here knows the instructions that numbers, text, lists, maps and
numpy's arrays are written with, and takes the few calls among them for what numpy means by them. It imports nothing and calls
nothing that a file names. Bounds: 4 MiB and a million instructions, which take under 0.3 GB and some seconds.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

from data.records import plain_array, read_npy_header

MAX_BYTES = 4 << 20
MAX_INSTRUCTIONS = 1_000_000

_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("builtins", "bytes"): "bytes",
    ("__builtin__", "bytes"): "bytes",
} | {
    (f"numpy.{core}.multiarray", name): name
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
}  # fmt: skip


class _Name(str):
    """A name out of ``_NAMES``, which a pickle's text cannot be taken for."""


class _Array:
    """An array that the pickle announces first and fills later."""

    value: Any = None


class _Type:
    """A dtype, of which the pickle gives the byte order later."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str):
            raise ValueError("has an array of no plain type")
        self.code, self.order = code, "|"


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = len(data)  # no honest pickle unpacks to more bytes than it has

    def run(self, name: str, argument: Any) -> None:
        """One instruction, by pickletools' name for it."""
        stack = self.stack
        if name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _BYTES:  # pickletools gives Python 2's strings as text
            stack.append(argument if isinstance(argument, bytes) else argument.encode("latin-1"))
        elif name in _TUPLES:
            self._push_tuple(len(stack) - _TUPLES[name])
        elif name == "TUPLE":
            self._push_tuple(self.marks.pop())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(self.marks.pop() if name == "APPENDS" else len(stack) - 1)
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(self.marks.pop() if name == "SETITEMS" else len(stack) - 2)
            keys = [_expect(key, str) for key in items[::2]]
            _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, named = argument.split(" ", 1) if name == "GLOBAL" else self._pop(len(stack) - 2)
            if (_expect(module, str), _expect(named, str)) not in _NAMES:
                raise ValueError(f"would call {module}.{named}, which is never done")
            stack.append(_Name(_NAMES[module, named]))
        elif name == "REDUCE":
            called, arguments = self._pop(len(stack) - 2)
            stack.append(self._call(_expect(called, _Name), _expect(arguments, tuple)))
        elif name == "BUILD":
            (state,) = self._pop(len(stack) - 1)
            self._fill(stack[-1], _expect(state, tuple))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"has the instruction {name}, which plain data do not need")

    def _pop(self, first: int) -> list[Any]:
        if not 0 <= first < len(self.stack) + 1:
            raise ValueError("takes more from its stack than there is")
        items = self.stack[first:]
        del self.stack[first:]
        return items

    def _push_tuple(self, first: int) -> None:
        self.stack.append(tuple(self._pop(first)))

    def _spend(self, data: bytes) -> bytes:
        self.budget -= len(data)
        if self.budget < 0:
            raise ValueError("unpacks to more bytes than it has")
        return data

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "_reconstruct":
            return _Array()
        if name == "dtype":
            return _Type(arguments[0])
        if name == "scalar":
            kind, data = arguments
            _expect(kind, _Type)
            return plain_array(kind.order + kind.code, (), self._spend(_expect(data, bytes))).item()
        if name == "encode":  # how Python 3 writes bytes for Python 2
            text, codec = arguments
            if codec not in ("latin1", "latin-1"):
                raise ValueError(f"has bytes in the code {codec!r}, expected latin1")
            return self._spend(_expect(text, str).encode("latin-1"))
        if name == "bytes" and not arguments:  # and the empty ones
            return b""
        raise ValueError(f"calls {name}, which plain data do not")

    def _fill(self, target: Any, state: tuple[Any, ...]) -> None:
        if isinstance(target, _Type):
            if state[1] not in ("<", ">", "|", "="):
                raise ValueError(f"has the byte order {state[1]!r}")
            target.order = state[1]
            return
        _, shape, kind, by_column, data = state
        _expect(kind, _Type)
        if kind.code.startswith("O"):
            # Of objects only one alone is of use: how numpy.save writes a map.
            (target.value,) = _expect(data, list) if shape == () and isinstance(target, _Array) else ()
            return
        if not isinstance(shape, tuple) or not isinstance(target, _Array):
            raise ValueError("fills what is no array")
        shape = shape[::-1] if by_column else shape
        array = plain_array(kind.order + kind.code, shape, self._spend(_expect(data, bytes)))
        target.value = array.T if by_column else array


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def read_plain(data: bytes) -> Any:
    """The value of a pickle, if it is plain; raises ``ValueError`` with a reason."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"has {len(data):,} bytes of pickle, expected at most {MAX_BYTES:,}")
    machine = _Machine(data)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"has more than {MAX_INSTRUCTIONS:,} instructions")
            machine.run(instruction.name, argument)
        (value,) = machine.stack
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is no pickle of plain data ({error or type(error).__name__})") from error
    return _filled(value)


def _filled(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def read_pickled_map(data: bytes) -> dict[str, Any]:
    """The map in an ``.npy`` that ``numpy.save`` wrote of one; its arrays as they are, other things left as they came.

    Raises ``ValueError``.
    """
    stream = io.BytesIO(data)
    shape, _, dtype = read_npy_header(stream)
    if shape != () or dtype.kind != "O":
        raise ValueError(f"has shape {list(shape)} and type {dtype}, expected one pickled map")
    return {key: _filled(value) for key, value in _expect(read_plain(stream.read()), dict).items()}

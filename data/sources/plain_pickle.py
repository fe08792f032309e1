"""Read numbers, text and numpy arrays from a pickled dict without calling anything that the pickle names.

MMF and MILVLG's extractor pickle boxes and confidences. Restricting ``pickle.Unpickler.find_class`` is not enough: a few
bytes can make the C unpickler reserve gigabytes for its memo, or hang on a dict key of nested tuples. Hence the unpickler
written in Python, whose dicts can be restricted too.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Collection
from typing import Any, ClassVar

import numpy as np

from data.records import plain_array, read_npy_header
from utils.errors import counted
from utils.files import short_repr

MAX_BYTES = 4 << 20
MAX_INSTRUCTIONS = 1_000_000  # a pickle within both limits needs less than 0.3 GB

_INSTRUCTIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "LONG4", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_NAMES = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("builtins", "bytes"), ("__builtin__", "bytes"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}  # fmt: skip


class _Call:
    """A function that the pickle names or, with ``arguments``, a call of it and the state set afterwards: only recorded."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = ()

    def __call__(self, *arguments: Any) -> _Call:
        if len(arguments) > 3:  # more than numpy ever passes, and a million would be copied by every call
            raise ValueError(f"calls {self.name} with {counted(len(arguments), 'argument')}")
        return _Call(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TextKeys(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise ValueError(f"has a dict with a {type(key).__name__} as key, expected text")
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> _Call:
        if (module, name) not in _NAMES:
            raise ValueError(f"would call {short_repr(f'{module}.{name}')}, expected plain data")
        return _Call(name)

    def load_empty_dictionary(self) -> None:
        self.append(_TextKeys())  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.EMPTY_DICT[0]: load_empty_dictionary}


def read_plain(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """Return those ``wanted`` entries that the pickled dict has: arrays, numbers or text.

    Raises ``ValueError`` for any other pickle.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"has {counted(len(data), 'byte')} of pickle, expected at most {MAX_BYTES:,}")
    try:
        for count, (instruction, *_) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"has more than {MAX_INSTRUCTIONS:,} instructions")
            if instruction.name not in _INSTRUCTIONS:
                raise ValueError(f"has the instruction {instruction.name}, which plain data do not need")
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if isinstance(value, _Call):  # numpy.save puts a dict into an array of one object
            (value,) = value.state[4]
        if not isinstance(value, dict):
            raise ValueError(f"has a {type(value).__name__}, expected a dict")
        return {key: _numpy_value(value[key]) for key in wanted if key in value}
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"is no pickle of plain data ({error or type(error).__name__})") from error


def _numpy_value(value: Any) -> Any:
    """The array, number or bytes that the recorded calls would make."""
    if not isinstance(value, _Call):
        return value
    if value.name == "scalar":
        dtype, data = value.arguments
        return _array(dtype, (), data).item()
    if value.name != "_reconstruct":
        return _bytes(value)
    _, shape, dtype, by_column, data = value.state
    return _array(dtype, shape[::-1], data).T if by_column else _array(dtype, shape, data)


def _array(dtype: _Call, shape: tuple[int, ...], data: Any) -> np.ndarray:
    byte_order, code = dtype.state[1], dtype.arguments[0]
    return plain_array(byte_order + code, shape, _bytes(data))


def _bytes(data: Any) -> bytes:
    if isinstance(data, _Call):  # how Python 3 writes bytes for Python 2
        text, codec = data.arguments or ("", "latin1")
        if data.name not in ("encode", "bytes") or codec not in ("latin1", "latin-1"):
            raise ValueError(f"calls {data.name}, which plain data do not need")
        return text.encode("latin-1")
    return data


def read_pickled_dict(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """``read_plain`` of the dict in an ``.npy`` that ``numpy.save`` wrote of it. Raises ``ValueError``."""
    stream = io.BytesIO(data)
    shape, _, dtype = read_npy_header(stream)
    if shape != () or dtype.kind != "O":
        raise ValueError(f"has shape {list(shape)} and type {dtype}, expected one pickled dict")
    return read_plain(stream.read(), wanted)

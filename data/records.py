"""Encode and decode records of an image database: named arrays as a msgpack map (as msgpack-numpy writes it) or as an ``.npz``.

Nothing here runs code that a file carries: arrays are views of plain bytes; pickled and structured ones are refused, and so is
what would unpack to far more than its size. Readers raise ``ValueError`` with a reason; callers add the file and the record.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgpack
import numpy as np

from utils.errors import counted
from utils.files import short_repr

MAX_RECORD_BYTES = MAX_ARRAY_BYTES = 64 << 20
MAX_ITEMS, MAX_CONTAINERS = 4096, 1024
_MAX_DIMENSIONS, _MAX_TYPE_LENGTH = 8, 32


def plain_array(description: Any, shape: Any, data: Any) -> np.ndarray:
    """Return a read-only array over ``data``, in native byte order; ``description`` is NumPy's, such as ``<f2``."""
    if isinstance(description, bytes):
        description = description.decode("ascii")
    if not isinstance(description, str) or not isinstance(shape, (list, tuple)) or not isinstance(data, bytes):
        raise ValueError("is not a plain array")
    if len(description) > _MAX_TYPE_LENGTH:  # NumPy would build a type of a million fields before it can be refused
        raise ValueError(f"has the unknown type {short_repr(description)}")
    try:
        dtype = np.dtype(description)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"has the unknown type {description!r}") from error
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"has type {description!r}, expected plain numbers; objects and pickles are never read")
    if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"has the impossible shape {short_repr(shape)}")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data):
        raise ValueError(f"holds {counted(len(data), 'byte')}, expected {expected} for shape {list(shape)} of {description!r}")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def unpack_map(packed: memoryview | bytes, **options: Any) -> dict[Any, Any]:
    """Unpack a msgpack map; ``options`` are those of ``msgpack.unpackb``. Raises ``ValueError``.

    One byte of msgpack can become an object of ninety bytes, so there are at most 1,024 lists and maps of at most 4,096 items
    each. 16 MiB then unpack to less than 512 MiB.
    """
    containers = 0

    def count(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS:,} lists and maps")
        return container

    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS, "list_hook": count, "object_hook": count}
    try:
        fields = msgpack.unpackb(
            packed, strict_map_key=False, ext_hook=lambda code, data: count(msgpack.ExtType(code, data)), **limits, **options
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"is not a msgpack record ({error or type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"is a msgpack {type(fields).__name__}, expected a map")
    return fields


def read_msgpack(record: memoryview | bytes, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Decode those of the ``wanted`` arrays that a msgpack record has; keys may be bytes or text, other fields are ignored."""
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"has {counted(len(record), 'byte')}, expected at most {MAX_RECORD_BYTES:,}")
    # raw, because old writers did not tell text from bytes: b"nd" and "nd" must be the same key.
    fields = unpack_map(record, raw=True)
    found = {name: field for name in wanted if (field := fields.get(name.encode())) is not None}
    return {name: _naming(name, _array_of, field) for name, field in found.items()}


def _naming(name: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``read``; prefix its errors with the name of the array."""
    try:
        return read(*arguments)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _array_of(field: Any) -> np.ndarray:
    if not isinstance(field, dict) or field.get(b"nd") is not True:
        raise ValueError("is not an array")
    if field.get(b"kind") not in (None, b""):
        raise ValueError("is an array of objects, which would need pickle; such records are never read")
    return plain_array(field.get(b"type"), field.get(b"shape"), field.get(b"data"))


def read_npz(record: memoryview | bytes, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Decode those of the ``wanted`` arrays that an ``.npz`` has; only they are decompressed, up to 64 MiB each."""
    members = read_members(record, wanted)
    return {name: _naming(name, read_npy, members.pop(name)) for name in list(members)}  # pop, so that none is held twice


def read_members(record: memoryview | bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """Decompress the ``.npy`` files of those of the ``wanted`` arrays that an ``.npz`` has, up to 64 MiB each."""
    try:
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            present = set(archive.namelist())
            return {name: _naming(name, _read_member, archive, name) for name in wanted if f"{name}.npy" in present}
    except (zipfile.BadZipFile, struct.error, OSError, EOFError, NotImplementedError, OverflowError) as error:
        raise ValueError(f"is not an .npz ({error or type(error).__name__})") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MAX_ARRAY_BYTES:
        raise ValueError(f"takes {counted(info.file_size, 'byte')}, expected at most {MAX_ARRAY_BYTES:,}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"is compressed in an unknown way ({info.compress_type}), expected deflate or none")
    # Without the number of bytes, zipfile unpacks up to 2 GiB before it compares with the announced size.
    with archive.open(info) as member:
        return member.read(info.file_size)


def read_npy(data: bytes) -> np.ndarray:
    """Decode the bytes of an ``.npy``."""
    stream = io.BytesIO(data)
    shape, by_column, dtype = read_npy_header(stream)
    if by_column:
        return plain_array(dtype.str, shape[::-1], stream.read()).T
    return plain_array(dtype.str, shape, stream.read())


def read_npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape of an ``.npy``, whether it is stored by column, and its type; leave ``stream`` at the data."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is in npy version {version}, expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read_header(stream)
    except Exception as error:  # NumPy parses a header as Python source, which can fail in any way
        raise ValueError(f"has no readable npy header ({type(error).__name__})") from error


def write_msgpack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode arrays as msgpack-numpy does."""
    fields = {
        name: {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape), b"data": array.tobytes()}
        for name, array in arrays.items()
    }
    return msgpack.packb(fields, use_bin_type=True)


def write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode arrays as a compressed ``.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()

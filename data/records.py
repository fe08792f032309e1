"""Records of an image database: named arrays as a msgpack map (msgpack-numpy's encoding) or as the bytes of an ``.npz``.

Nothing here can run code that a file carries: arrays are views of plain bytes, pickled or structured ones are refused. The
readers raise ``ValueError`` with a reason; callers add the names of the file and of the record.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import msgpack
import numpy as np

from utils.files import short_repr

MAX_RECORD_BYTES = MAX_ARRAY_BYTES = 64 << 20
MAX_ITEMS, MAX_CONTAINERS = 4096, 1024
_MOST_DIMENSIONS, _LONGEST_TYPE = 8, 32


def plain_array(description: Any, shape: Any, data: Any) -> np.ndarray:
    """A read-only array over ``data``, in the machine's byte order; ``description`` is numpy's, such as ``<f2``."""
    if isinstance(description, bytes):
        description = description.decode("ascii")
    if not isinstance(description, str) or not isinstance(shape, (list, tuple)) or not isinstance(data, bytes):
        raise ValueError("is not a plain array")
    if len(description) > _LONGEST_TYPE:  # of structures with a million fields, numpy would make a type first
        raise ValueError(f"has the unknown type {short_repr(description)}")
    try:
        dtype = np.dtype(description)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"has the unknown type {description!r}") from error
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"has type {description!r}, expected plain numbers; objects and pickles are never read")
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"has the impossible shape {short_repr(shape)}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"holds {len(data)} bytes where its shape {list(shape)} and type {description!r} do not")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def unpack_map(packed: memoryview | bytes, **options: Any) -> dict[Any, Any]:
    """The map that ``packed`` is in msgpack; ``options`` are those of ``msgpack.unpackb``. Raises ``ValueError``.

    A byte of msgpack can make an object of ninety, so lists and maps have at most 4,096 items, and there are at most 1,024 of
    them. What 16 MiB unpack to takes under 512 MiB then.
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
    """Those of the ``wanted`` arrays that a msgpack record has; keys may be bytes or text, other fields are not looked at."""
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"has {len(record):,} bytes, expected at most {MAX_RECORD_BYTES:,}")
    # Everything raw: old writers did not tell text from bytes, so b"nd" and "nd" must be the same key.
    fields = unpack_map(record, raw=True)
    arrays = {}
    for name in wanted:
        field = fields.get(name.encode())
        if field is None:
            continue
        if not isinstance(field, dict) or field.get(b"nd") is not True:
            raise ValueError(f"{name}: is not an array")
        if field.get(b"kind") not in (None, b""):
            raise ValueError(f"{name}: is an array of objects, which would need pickle; such records are never read")
        try:
            arrays[name] = plain_array(field.get(b"type"), field.get(b"shape"), field.get(b"data"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return arrays


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MAX_ARRAY_BYTES:
        raise ValueError(f"takes {info.file_size:,} bytes, expected at most {MAX_ARRAY_BYTES:,}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"is compressed in an unknown way ({info.compress_type})")
    # With a number of bytes, or else the zip reader unpacks up to 2 GiB before it compares with the size announced.
    with archive.open(info) as member:
        return member.read(info.file_size)


def read_members(record: memoryview | bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """The ``.npy`` files of those of the ``wanted`` arrays that an ``.npz`` has; none that claims over 64 MiB is unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            present = set(archive.namelist())
            members = {}
            for name in wanted:
                if f"{name}.npy" in present:
                    try:
                        members[name] = _read_member(archive, name)
                    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                        raise ValueError(f"{name}: {error}") from error
            return members
    except (zipfile.BadZipFile, struct.error, OSError, EOFError, NotImplementedError, OverflowError) as error:
        raise ValueError(f"is not an .npz ({error or type(error).__name__})") from error


def read_npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether by column, and type of an ``.npy``; ``stream`` is then at its data."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is in npy version {version}, expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read_header(stream)
    except Exception as error:  # numpy reads a header as Python source, which can be wrong in any way
        raise ValueError(f"has no readable npy header ({type(error).__name__})") from error


def read_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an ``.npy``."""
    stream = io.BytesIO(data)
    shape, by_column, dtype = read_npy_header(stream)
    if by_column:
        return plain_array(dtype.str, shape[::-1], stream.read()).T
    return plain_array(dtype.str, shape, stream.read())


def read_npz(record: memoryview | bytes, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the ``wanted`` arrays that an ``.npz`` has; only they are decompressed, and none that claims over 64 MiB."""
    arrays = {}
    members = read_members(record, wanted)
    for name in list(members):
        try:
            arrays[name] = read_npy(members.pop(name))  # and no longer held twice
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return arrays


def write_msgpack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The record that msgpack-numpy writes for a map of arrays."""
    fields = {
        name: {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape), b"data": array.tobytes()}
        for name, array in arrays.items()
    }
    return msgpack.packb(fields, use_bin_type=True)


def write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a compressed ``.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def all_finite(array: np.ndarray) -> bool:
    """Whether a floating array has neither NaN nor infinity."""
    if array.dtype == np.float16:
        # Twelve times as fast as numpy's own test of halves: both have all bits of the exponent set.
        return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(array).all())

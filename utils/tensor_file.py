"""Checks a ``.pt`` file before ``torch.load`` reads it.

With ``weights_only=True`` torch runs no code that a file brings, but a file of a few hundred bytes can have it fill the memory,
and releases before 2.6 run the code of one in the guise of a TorchScript or tar archive. What passes here is a zip archive that
is not compressed, or the container of before torch 1.6; it calls nothing but what makes plain tensors, and holds all the bytes
that they take.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from utils.files import short_repr

MAX_PICKLE_BYTES = 4 << 20
MAX_INSTRUCTIONS = 500_000

_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip
_REBUILDING = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}
_ELEMENT_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage"), 1),
}
_LEGACY_PICKLES = 5  # a magic number, a version, a machine, the value, and the names of the storages whose bytes follow
_VALUE = 3


def check_tensor_file(path: str | Path) -> None:
    """Raise ``ValueError`` with a reason when ``torch.load`` should not read ``path``; ``OSError`` when it cannot be opened."""
    with open(path, "rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
        size = file.seek(0, io.SEEK_END)
        try:
            if head.startswith(b"PK\x03\x04"):
                _check_zip(file, size)
            else:
                _check_legacy(file, head, size)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"it is no zip archive ({error or type(error).__name__})") from error


def _check_zip(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        file.seek(-min(size, 98), io.SEEK_END)
        if _directory_start(file.read(), size) != archive.start_dir:
            raise ValueError("its zip directory is not where it is said to be")
        if any(member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size for member in members):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its members lie on top of each other")
        # Torch does not tell a from A in these names, nor does it stop at a zero byte.
        by_name = {member.orig_filename.lower(): member for member in members}
        if len(by_name) < len(members):
            raise ValueError("two of its members have one name")
        folder = members[0].filename.lower().partition("/")[0] if members else ""
        if f"{folder}/data.pkl" not in by_name or f"{folder}/constants.pkl" in by_name:
            raise ValueError("it is not an archive of torch.save")
        described = by_name[f"{folder}/data.pkl"]
        if described.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {described.file_size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
        for key, needed in _storages(io.BytesIO(archive.read(described))).items():
            member = by_name.get(f"{folder}/data/{key}".lower())
            if member is None or member.file_size != needed:
                raise ValueError(f"storage {short_repr(key)} is absent or not of {needed:,} bytes")


def _directory_start(tail: bytes, size: int) -> int:
    """Where the last bytes of a zip say that its directory is; two readers could take them differently if it were not there."""
    if tail[-42:-38] != b"PK\x06\x07":
        return int.from_bytes(tail[-6:-2], "little")
    record = int.from_bytes(tail[-34:-26], "little")
    return int.from_bytes(tail[48:56], "little") if record == size - 98 else -1


def _check_legacy(file: IO[bytes], head: bytes, size: int) -> None:
    file.seek(0)
    with suppress(tarfile.TarError):
        tarfile.open(fileobj=file, mode="r:").close()
        raise ValueError("it is a tar archive")
    stream = io.BytesIO(head)
    storages = [_storages(stream) for _ in range(_LEGACY_PICKLES)]
    needed, left = sum(storages[_VALUE].values()), size - stream.tell()
    if needed > left or any(storages[:_VALUE]) or storages[-1]:
        raise ValueError(f"its tensors take {needed:,} bytes, of which it has {left:,}")


def _storages(stream: io.BytesIO) -> dict[str, int]:
    """The storages that the pickle at this place asks for, and how many bytes they have; ``stream`` is then behind it."""
    start = stream.tell()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if instruction.name not in _INSTRUCTIONS:
            raise ValueError(f"its pickle has the instruction {instruction.name}, which plain tensors do not need")
        highest: Any = argument if instruction.name == "LONG_BINPUT" else 0
        if max(count, highest) >= MAX_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
    inspector = _Inspector(io.BytesIO(stream.getbuffer()[start : stream.tell()]))
    try:
        inspector.load()
    except ValueError:
        raise
    except Exception as error:  # a pickle can go wrong in any way
        raise ValueError(f"its pickle is broken ({type(error).__name__})") from error
    return inspector.storages


class _Inspector(pickle.Unpickler):
    """Runs a pickle with nothing behind the names in it."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for an allowed name, made anew as a pickle can change it; for a storage, how many bytes an element has."""
        if module == "torch" and name in _ELEMENT_BYTES:
            return _ELEMENT_BYTES[name]
        if module == "torch._utils" and name in _REBUILDING:
            return lambda *arguments: None
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()
        raise ValueError(f"it would call {short_repr(f'{module}.{name}')}, expected plain numbers")

    def persistent_load(self, saved: Any) -> None:
        """Take note of a storage."""
        kind, element_bytes, key, _, count, *_ = saved
        if kind != "storage" or type(element_bytes) is not int or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("one of its storages is not described as torch does")
        self.storages[key] = max(self.storages.get(key, 0), element_bytes * count)

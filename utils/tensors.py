"""Read and write files of tensors: written whole or not at all, read without running code and in memory that fits the file.

``torch.load(weights_only=True)`` runs no code, but a file of a kilobyte can still make it fill the memory, by a compressed
archive or by a call such as ``bytearray(10**10)``, and before torch 2.10 read past the end of a storage. Therefore each file is
first checked: an uncompressed zip archive or the container of before torch 1.6, whose pickle makes plain tensors only and whose
storages are all in the file.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from utils.errors import InputError, counted
from utils.files import atomic_file, reading, short_repr

# What a pickle may name, and what stands in for it: for a storage, the bytes per element.
_STAND_INS: dict[tuple[str, str], Any] = {
    **{("torch", f"{name}Storage"): 8 for name in ("Double", "Long")},
    **{("torch", f"{name}Storage"): 4 for name in ("Float", "Int")},
    **{("torch", f"{name}Storage"): 2 for name in ("Half", "BFloat16", "Short")},
    **{("torch", f"{name}Storage"): 1 for name in ("Char", "Byte", "Bool")},
    **{("torch._utils", f"_rebuild_{name}"): lambda *_: None for name in ("tensor", "tensor_v2", "parameter")},
    ("collections", "OrderedDict"): lambda: OrderedDict(),  # a copy of a large argument could be asked for again and again
}


def save_tensors(path: str | Path, value: Any) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers and strings, atomically.

    Raises:
        InputError: the file cannot be written, or a number is not finite; the former file at ``path`` is kept.
    """
    _check_finite(path, value)
    with atomic_file(path) as file:
        stream = _Stream(file)
        try:
            torch.save(value, cast("IO[bytes]", stream))
        except RuntimeError as error:
            raise stream.error or error from error


def load_tensors(path: str | Path) -> Any:
    """Return the content of a ``.pt`` file, in torch's present or pre-1.6 container, with its tensors on the CPU.

    Raises:
        InputError: the file is missing, damaged, would run code, or describes more tensors than it has bytes for.
    """
    with reading(path, "a checkpoint") as file:
        try:
            _check(file)
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can make torch raise anything
            reason = error if isinstance(error, InputError) else getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"{path}: not a readable checkpoint of tensors ({reason})") from error


class _Stream:
    """A file that keeps the error of a full disk, for which ``torch.save`` raises a RuntimeError that does not say so."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_finite(path: str | Path, value: Any, name: str = "") -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(path, item, f"{name} {key}".strip())
    elif isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"{path}: not written, {name} is not finite; lower learning_rate")


def _check(file: IO[bytes]) -> None:
    """Raise ``InputError`` with a reason, or any other error, if ``torch.load`` should not read ``file``."""
    size = file.seek(0, io.SEEK_END)
    longest = max(1 << 20, size // 64)  # of a pickle, one byte of which can make an object of 64
    file.seek(0)
    head = file.read(longest)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(file, size, longest)
        return
    if head[257:262] == b"ustar":
        raise InputError("it is a tar archive")
    inspector = _Inspector(io.BytesIO(head))
    for _ in range(5):  # a magic number, a version, a machine, the value, and the names of the storages, whose bytes follow
        inspector.load()
    if (needed := sum(inspector.storages.values())) > size:
        raise InputError(f"its tensors take {counted(needed, 'byte')}, the file has {size:,}")


def _check_zip(file: IO[bytes], size: int, longest: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {member.orig_filename: member for member in archive.infolist()}
        distinct = len({name.lower() for name in members}) == len(archive.infolist())  # torch's reader ignores case
        fits = sum(member.file_size for member in members.values()) <= size
        file.seek(-min(size, 98), io.SEEK_END)
        if not (distinct and fits and _directory_start(file.read(), size) == archive.start_dir):
            raise InputError("its members are compressed, overlap or have one name, which torch.save never does")
        folder = next(iter(members), "").partition("/")[0]
        pickled = members.get(f"{folder}/data.pkl")
        if pickled is None or f"{folder}/constants.pkl" in members:
            raise InputError("it is not an archive of torch.save")
        if pickled.file_size > longest:
            raise InputError(f"its data.pkl has {pickled.file_size:,} bytes, expected at most {longest:,}")
        inspector = _Inspector(io.BytesIO(archive.read(pickled)))
        inspector.load()
        for key, needed in inspector.storages.items():
            record = members.get(f"{folder}/data/{key}")
            if record is None or record.file_size != needed:
                raise InputError(f"storage {short_repr(key)} is missing or does not have {needed:,} bytes")


def _directory_start(tail: bytes, size: int) -> int:
    """Return where a zip's last bytes say that its directory is: if it is elsewhere, torch's reader sees other members."""
    if tail[-42:-38] != b"PK\x06\x07":
        return int.from_bytes(tail[-6:-2], "little")
    record = int.from_bytes(tail[-34:-26], "little")
    return int.from_bytes(tail[48:56], "little") if record == size - 98 else -1


class _Inspector(pickle._Unpickler):
    """Run a pickle with nothing behind its names, and note how many bytes each storage takes that it asks for.

    The unpickler written in Python: the one in C allocates a memo as large as the largest index in the pickle.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.storages: dict[Any, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise InputError(f"it would call {short_repr(f'{module}.{name}')}, expected plain numbers")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> None:
        """Note a storage, ("storage", type, key, location, number of elements)."""
        _, element_bytes, key, _, count, *_ = pid
        self.storages[key] = max(self.storages.get(key, 0), index(element_bytes) * index(count))

"""LMDB folders: a reader whose environment is shared within a process, and a writer whose folder appears only when complete."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import lmdb

from utils.errors import InputError, counted
from utils.files import atomic_folder, reading

MAX_KEY_BYTES = 511  # LMDB's compile-time limit
_FLUSH_BYTES = 32 << 20
_FIRST_MAP_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 16 << 10

Result = TypeVar("Result")
_lock = threading.RLock()
_readers: WeakSet[LmdbReader] = WeakSet()


def _close_inherited() -> None:
    """After a fork, close the parent's environments: they must not be used, and while they are open, no others can be."""
    global _lock
    _lock = threading.RLock()
    for reader in _readers:
        reader.close()


os.register_at_fork(after_in_child=_close_inherited)


class LmdbReader:
    """Read-only view of an LMDB folder, opened at the first look-up in each process; can be pickled and survives a fork.

    LMDB refuses to open a path twice in a process, so the readers of a path share an environment. Set ``readahead`` to read
    everything in order. Every method raises ``InputError`` if the database is missing, truncated or not LMDB.
    """

    def __init__(self, path: Path | str, readahead: bool = False) -> None:
        self.path = Path(path)
        self._readahead = readahead
        self._real_path = os.path.realpath(self.path)
        self._environment: lmdb.Environment | None = None
        with _lock:
            _readers.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return LmdbReader, (self.path, self._readahead)

    def __enter__(self) -> LmdbReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # modules may be gone at interpreter exit
            self.close()

    def _shared(self) -> lmdb.Environment | None:
        """The environment of another reader of this path, if one is open."""
        open_here = (reader._environment for reader in _readers if reader._real_path == self._real_path)
        return next((environment for environment in open_here if environment is not None), None)

    def _open(self) -> lmdb.Environment:
        with _lock:
            if self._environment is None:
                self._environment = self._shared() or _open_checked(self.path, self._readahead)
            return self._environment

    def close(self) -> None:
        """Release the database; the last reader of a path closes it, and a later look-up opens it again."""
        with _lock:
            environment, self._environment = self._environment, None
            if environment is not None and self._shared() is None:
                environment.close()

    def _read(self, read: Callable[[lmdb.Transaction], Result], key: str = "") -> Result:
        try:
            with self._open().begin(buffers=True) as transaction:
                return read(transaction)
        except lmdb.Error as error:
            record = f", looking for {key!r}" if key else ""
            raise InputError(f"{self.path / 'data.mdb'}: cannot be read ({_reason(error)}){record}") from error

    def get(self, key: str) -> memoryview:
        """Return the value of ``key`` without copying it; the view must not be used after ``close``.

        Raises ``InputError`` if there is no such key.
        """
        value = self._read(lambda transaction: _look_up(transaction, key), key)
        if value is None:
            raise InputError(f"{self.path}: has no record {key!r}")
        return value

    def absent(self, keys: Iterable[str]) -> list[str]:
        """Return those of ``keys`` that have no record; takes a second or two for a million."""
        return self._read(lambda transaction: [key for key in keys if _look_up(transaction, key) is None])

    def __contains__(self, key: str) -> bool:
        return not self.absent([key])

    def keys(self) -> list[str]:
        """Return the names of all records in LMDB's order, without special keys such as ``__keys__``.

        Raises ``InputError`` also if damaged pages lead to names out of order, or not to all.
        """
        return [key.decode("utf-8", "surrogateescape") for key in self._read(self._ordered_keys) if not _is_special(key)]

    def _ordered_keys(self, transaction: lmdb.Transaction) -> list[bytes]:
        damaged, keys, last = f"{self.path / 'data.mdb'}: its pages are damaged", [], b""
        for key in map(bytes, transaction.cursor().iternext(values=False)):
            if key <= last:  # a page that leads back to an earlier one would be listed forever
                raise InputError(f"{damaged}, names are not in order; write the database again")
            keys.append(key)
            last = key
        entries = self._open().stat()["entries"]
        if len(keys) != entries:
            raise InputError(f"{damaged}, they list {len(keys):,} of {counted(entries, 'record')}; write the database again")
        return keys

    def __len__(self) -> int:
        return len(self.keys())

    def fingerprint(self) -> str:
        """Return a checksum that changes when the database is written to, and does not when it is copied or moved.

        It covers the length, LMDB's own header, which counts transactions, and samples of the rest, not every byte.
        """
        file = self.path / "data.mdb"
        digest = hashlib.sha256()
        with reading(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for sample in range(_SAMPLES):
                stream.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _open_checked(path: Path, readahead: bool) -> lmdb.Environment:
    """Open ``path`` for reading. Refuse a file that is shorter than its header says: reading past its end is a SIGBUS."""
    file = path / "data.mdb"
    with reading(file, "an LMDB database") as stream:
        size = os.fstat(stream.fileno()).st_size
    if size == 0:
        raise InputError(f"{file}: empty file, expected an LMDB database")
    try:
        environment = lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=readahead, create=False)
    except lmdb.Error as error:
        raise InputError(f"{file}: cannot be read as LMDB ({_reason(error)})") from error
    expected = _size_by_header(environment)
    if size < expected:
        environment.close()
        raise InputError(f"{file}: truncated to {size:,} bytes, its header says {expected:,}; copy or download it again")
    return environment


def _size_by_header(environment: lmdb.Environment) -> int:
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def _reason(error: lmdb.Error) -> str:
    """LMDB's message without the path in front of it."""
    return str(error).rsplit(": ", 1)[-1]


def _look_up(transaction: lmdb.Transaction, key: str) -> Any:
    try:
        return transaction.get(key.encode("utf-8", "surrogateescape"))
    except (UnicodeEncodeError, lmdb.BadValsizeError):  # no database can hold this key
        return None


def _is_special(key: bytes) -> bool:
    return key.startswith(b"__") and key.endswith(b"__")


def check_name(name: str, where: str = "") -> None:
    """Raise ``InputError``, with ``where`` in front of what is wrong, unless a record can have this name."""
    key = name.encode("utf-8", "surrogateescape")
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise InputError(f"{where}has a name of {counted(len(key), 'byte')}, expected 1 to {MAX_KEY_BYTES}")
    if _is_special(key):
        raise InputError(f"{where}has a reserved name, expected one that does not begin and end with __")


class LmdbWriter:
    """Writes a new LMDB folder, which appears at ``path`` when the ``with`` block succeeds, and is at ``folder`` until then.

    ``finish`` is called at the end of a block that succeeds, for records and files that depend on all others. Raises
    ``InputError`` if ``path`` exists, if another process is writing it, and if the disk is full or read-only.
    """

    def __init__(self, path: Path | str, finish: Callable[[], None] = lambda: None) -> None:
        self.path = Path(path)
        self._finish = finish
        self._stack = ExitStack()
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0

    def __enter__(self) -> LmdbWriter:
        with self._stack as stack:
            self.folder = stack.enter_context(atomic_folder(self.path))
            try:
                self._environment = lmdb.open(os.fsencode(self.folder), map_size=_FIRST_MAP_BYTES, lock=False, sync=False)
            except lmdb.Error as error:
                raise InputError(f"{self.path}: cannot be written ({_reason(error)})") from error
            stack.callback(self._environment.close)
            stack.push(self._complete)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def put(self, key: str, value: bytes) -> None:
        """Add one record. The key must be new, and one that ``check_name`` accepts or a special one."""
        self._pending.append((key.encode("utf-8", "surrogateescape"), value))
        self._pending_bytes += len(value)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        while self._pending:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                self._pending, self._pending_bytes = [], 0
            except lmdb.MapFullError:
                # A full map loses the whole transaction, which is why records are kept until their commit.
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                hint = "; is the disk full?" if "Input/output" in str(error) else ""  # LMDB's message for a full disk
                raise InputError(f"{self.path}: cannot be written ({_reason(error)}){hint}") from error

    def _complete(self, kind: type[BaseException] | None, *_: object) -> None:
        """Unless the block failed, write what is left and bring the file to its full length on disk."""
        if kind is not None:
            return
        self._finish()
        self._flush()
        size = _size_by_header(self._environment)
        self._environment.close()
        with open(self.folder / "data.mdb", "r+b") as file:
            # LMDB may leave free pages at the end unwritten, and readers refuse a short file as truncated.
            file.truncate(max(size, file.seek(0, os.SEEK_END)))
            os.fsync(file.fileno())

"""LMDB folders: a read-only store shared within a process, and a writer whose folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from utils.errors import InputError
from utils.files import atomic_folder

MAX_KEY_BYTES = 511  # what LMDB is built for
_FLUSH_BYTES = 32 << 20
_FIRST_MAP_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 16 << 10

# LMDB refuses to open one path twice in a process, so the readers of a path share an environment:
# real path -> [environment, number of readers].
_shared: dict[str, list[Any]] = {}
_lock = threading.RLock()


def _drop_inherited() -> None:
    """An environment must not be used across a fork, and a path cannot be opened anew while the inherited one is open."""
    global _lock
    _lock = threading.RLock()
    for environment, _ in _shared.values():
        with suppress(lmdb.Error):
            environment.close()
    _shared.clear()


os.register_at_fork(after_in_child=_drop_inherited)


def _open_checked(path: Path, readahead: bool) -> lmdb.Environment:
    """Open ``path`` for reading; a file shorter than its header promises is refused, since reading past its end is a SIGBUS."""
    file = path / "data.mdb"
    try:
        if not file.is_file():
            raise InputError(f"{path}: not a database (no data.mdb in it)")
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise InputError(f"{file}: empty file, expected an LMDB database")
    try:
        environment = lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=readahead, create=False)
    except lmdb.Error as error:
        raise InputError(f"{file}: cannot be read as LMDB ({_reason(error)})") from error
    promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < promised:
        environment.close()
        raise InputError(f"{file}: truncated, it has {size:,} bytes where its header promises {promised:,}")
    return environment


def _reason(error: lmdb.Error) -> str:
    """What LMDB says, without the path that it puts before it."""
    return str(error).rsplit(": ", 1)[-1]


def _possible_key(key: str, longest: int) -> bytes | None:
    """The bytes of ``key`` in a database, None if it is one that no database can hold."""
    try:
        encoded = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return encoded if 0 < len(encoded) <= longest else None


def is_special(key: bytes) -> bool:
    """Whether ``key`` is a note such as ``__keys__`` and not the name of a record."""
    return key.startswith(b"__") and key.endswith(b"__")


def check_name(name: str) -> None:
    """``ValueError`` unless ``name`` can be that of a record."""
    encoded = name.encode("utf-8", "surrogateescape")
    if not 0 < len(encoded) <= MAX_KEY_BYTES:
        raise ValueError(f"has a name of {len(encoded)} bytes, expected 1 to {MAX_KEY_BYTES}")
    if is_special(encoded):
        raise ValueError("has a name that databases keep for themselves")


class LmdbReader:
    """Read-only view of an LMDB folder, opened at the first look-up in each process; safe to pickle and to carry over a fork.

    ``readahead`` is for whoever reads all of it in its order. Every method raises ``InputError`` when the database is missing,
    truncated, or not LMDB.
    """

    def __init__(self, path: Path | str, readahead: bool = False) -> None:
        self.path = Path(path)
        self._readahead = readahead
        self._environment: lmdb.Environment | None = None
        self._pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "readahead": self._readahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __enter__(self) -> LmdbReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # modules may be gone when the interpreter ends
            self.close()

    def _open(self) -> lmdb.Environment:
        environment = self._environment
        if environment is not None and self._pid == os.getpid():
            return environment
        with _lock:
            if self._environment is None or self._pid != os.getpid():
                real = os.path.realpath(self.path)
                if real not in _shared:
                    _shared[real] = [_open_checked(self.path, self._readahead), 0]
                _shared[real][1] += 1
                self._environment, self._pid = _shared[real][0], os.getpid()
            return self._environment

    def close(self) -> None:
        """Let go of the database (the last reader of a path closes it); a later look-up opens it again."""
        with _lock:
            if self._environment is not None and self._pid == os.getpid():
                real = os.path.realpath(self.path)
                entry = _shared[real]
                entry[1] -= 1
                if entry[1] == 0:
                    del _shared[real]
                    entry[0].close()
            self._environment = None

    def _find(self, key: str) -> memoryview | None:
        environment = self._open()
        encoded = _possible_key(key, environment.max_key_size())
        try:
            with environment.begin(buffers=True) as transaction:
                return None if encoded is None else transaction.get(encoded)
        except lmdb.Error as error:
            raise InputError(f"{self.path / 'data.mdb'}: cannot be read ({_reason(error)}), looking for {key!r}") from error

    def get(self, key: str) -> memoryview:
        """The value of ``key``, without copying it; the view must not be used after ``close``.

        Raises ``InputError`` when there is no such key.
        """
        value = self._find(key)
        if value is None:
            raise InputError(f"{self.path}: has no record {key!r}")
        return value

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def absent(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that have no record; a million are looked up in a second or two."""
        environment = self._open()
        longest, without = environment.max_key_size(), []
        try:
            with environment.begin(buffers=True) as transaction:
                for key in keys:
                    encoded = _possible_key(key, longest)
                    if encoded is None or transaction.get(encoded) is None:
                        without.append(key)
        except lmdb.Error as error:
            raise InputError(f"{self.path / 'data.mdb'}: cannot be read ({_reason(error)})") from error
        return without

    def keys(self) -> Iterator[str]:
        """Names of all records in LMDB's order, without special keys such as ``__keys__``."""
        try:
            with self._open().begin() as transaction:
                for key in transaction.cursor().iternext(values=False):
                    if not is_special(key):
                        yield key.decode("utf-8", "surrogateescape")
        except lmdb.Error as error:
            raise InputError(f"{self.path / 'data.mdb'}: cannot be read ({_reason(error)})") from error

    def fingerprint(self) -> str:
        """A checksum that changes when the database is written to, and does not when it is copied or moved.

        It covers the length, LMDB's own header, which counts transactions, and samples of what lies between, not every byte.
        """
        file = self.path / "data.mdb"
        digest = hashlib.sha256()
        try:
            with open(file, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for sample in range(_SAMPLES):
                    stream.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE_BYTES))
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def __len__(self) -> int:
        environment = self._open()
        special = 0
        try:
            with environment.begin() as transaction:
                cursor = transaction.cursor()
                more = cursor.set_range(b"__")
                while more and cursor.key().startswith(b"__"):
                    special += is_special(cursor.key())
                    more = cursor.next()
                return environment.stat()["entries"] - special
        except lmdb.Error as error:
            raise InputError(f"{self.path / 'data.mdb'}: cannot be read ({_reason(error)})") from error


class LmdbWriter:
    """Writes a new LMDB folder, which appears under its name when the ``with`` block succeeds.

    ``folder`` is where it is meanwhile, and where files that belong beside ``data.mdb`` are put. Raises ``InputError`` when
    ``path`` exists or another process is writing it, for a key that occurs twice or is too long, and when the disk refuses.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0

    def __enter__(self) -> LmdbWriter:
        with self._stack as stack:
            self.folder = stack.enter_context(atomic_folder(self.path))
            try:
                self._environment = lmdb.open(os.fsencode(self.folder), map_size=_FIRST_MAP_BYTES, lock=False, sync=False)
            except lmdb.Error as error:
                raise InputError(f"{self.path}: cannot be written ({error})") from error
            stack.callback(self._environment.close)
            self._stack = stack.pop_all()
        return self

    def put(self, key: str, value: bytes) -> None:
        """Add one record."""
        encoded = key.encode("utf-8", "surrogateescape")
        longest = self._environment.max_key_size()
        if not 0 < len(encoded) <= longest:
            raise InputError(f"{self.path}: key {key!r} has {len(encoded)} bytes, expected 1 to {longest}")
        self._pending.append((encoded, value))
        self._pending_bytes += len(encoded) + len(value)
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        if not transaction.put(key, value, overwrite=False):
                            raise InputError(f"{self.path}: key {key.decode('utf-8', 'replace')!r} occurs twice")
                break
            except lmdb.MapFullError:
                # A full map loses the whole transaction, which is why records are kept until their commit.
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                hint = ", perhaps of a full disk" if "Input/output" in str(error) else ""  # which LMDB calls so
                raise InputError(f"{self.path}: cannot be written ({_reason(error)}{hint})") from error
        self._pending.clear()
        self._pending_bytes = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._flush()
            self._finish()

    def _finish(self) -> None:
        """Bring the file to its whole length, on the disk."""
        whole = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        self._environment.close()
        with open(self.folder / "data.mdb", "r+b") as file:
            # LMDB may leave free pages at the end unwritten; readers take a short file for a truncated one.
            file.truncate(max(whole, file.seek(0, os.SEEK_END)))
            os.fsync(file.fileno())

"""Read databases that may be damaged. LMDB trusts its pages, and damaged ones can kill or block the process that reads them."""

from __future__ import annotations

import faulthandler
import mmap
import multiprocessing
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.inspection.report import Faults, Summary
from data.lmdb_store import MAX_KEY_BYTES, LmdbReader
from utils import files
from utils.errors import InputError
from utils.files import short_repr
from utils.parallel import WorkerFailed, cannot_start
from utils.signals import blocked, ignore_stop_signals

UNREADABLE = "files that cannot be read"
PATIENCE = 300.0  # seconds without progress after which a child process is killed
_NAMES_AT_ONCE = 10_000
_FORK = multiprocessing.get_context("fork")  # the parent has no database open, and the child need not import anything

Check = Callable[[LmdbReader, Sequence[Any]], Summary]  # of some records, by what is known of each


class _ChildDied(InputError):
    """A child process was killed, by damaged pages or because it made no progress."""


class _AnnouncingReader(LmdbReader):
    """Writes the name of each record into ``note``, memory shared with the parent process, before reading the record."""

    def __init__(self, path: Path, note: mmap.mmap) -> None:
        super().__init__(path, readahead=True)
        self._note = note

    def get(self, key: str) -> memoryview:
        self._note[:] = key.encode("utf-8", "surrogateescape").ljust(MAX_KEY_BYTES, b"\0")
        return super().get(key)


@contextmanager
def _child(folder: Path, produce: Callable[..., Iterable[Any]], *args: Any) -> Iterator[Iterator[Any]]:
    """The items of ``produce(store, *args)``, which reads an LMDB folder in a child process.

    Iterating raises ``InputError`` as ``produce`` does, and ``_ChildDied``. Raises ``WorkerFailed`` if no child can be started.
    """

    def serve() -> None:
        pipe.close()  # so that the pipe breaks when the parent ends
        ignore_stop_signals()
        faulthandler.disable()  # the parent reports how this process dies
        try:
            with _AnnouncingReader(folder, note) as store:
                for item in produce(store, *args):
                    theirs.send(item)
        except InputError as error:
            theirs.send(error)

    def items() -> Iterator[Any]:
        while pipe.poll(PATIENCE):
            try:
                item = pipe.recv()
            except (EOFError, OSError):
                process.join()
                if not process.exitcode:
                    return
                raise died(_describe_exit(process.exitcode)) from None
            if isinstance(item, InputError):
                raise item
            yield item
        raise died(f"made no progress in {PATIENCE:g} seconds; probably its pages are damaged")

    def died(how: str) -> _ChildDied:
        name = note[:].rstrip(b"\0").decode("utf-8", "surrogateescape")
        where = f"at record {name!r}" if name else "at the list of records"
        return _ChildDied(f"{folder / 'data.mdb'}: {where}, the process that read it {how}")

    process = _FORK.Process(target=serve, daemon=True)
    try:
        pipe, theirs = _FORK.Pipe(duplex=False)
        note = mmap.mmap(-1, MAX_KEY_BYTES)
        with theirs, blocked():
            process.start()
    except OSError as error:
        raise cannot_start(error, "--nproc") from error
    try:
        yield items()
    finally:
        process.kill()
        process.join()
        pipe.close()


def _describe_exit(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}; see its traceback"
    likely = "memory is short, try a smaller --nproc" if code == -signal.SIGKILL else "its pages are damaged"
    return f"ended with {signal.Signals(-code).name}; probably {likely}"


@dataclass(frozen=True)
class Reading:
    """Which records are read: ``sample`` of each LMDB, drawn at random, or all; in ``nproc`` child processes."""

    sample: int | None
    nproc: int

    def chosen(self, names: list[str]) -> list[str]:
        """The names of the records to read, always the same, in their order."""
        if self.sample is None or self.sample >= len(names):
            return names
        return [names[index] for index in sorted(random.Random(0).sample(range(len(names)), self.sample))]

    def describe(self, names: list[str] | None) -> str:
        """The number of records, and of those in the sample."""
        if names is None:
            return "cannot be read"
        chosen = len(self.chosen(names))
        return f"{len(names):,}" if chosen == len(names) else f"{len(names):,}, of which a sample of {chosen:,} was read"

    def check(self, folder: Path, check: Check, records: Sequence[Any], at_once: int) -> Summary:
        """Check ``records`` of an LMDB folder, ``at_once`` at a time, up to one whose reading kills the process."""
        pieces = [records[first : first + at_once] for first in range(0, len(records), at_once)]
        nproc = min(self.nproc, len(pieces))
        total = Summary()
        with ExitStack() as stack, tqdm(total=len(records), unit=" records", disable=None, leave=False) as progress:
            shares = [pieces[first::nproc] for first in range(nproc)]
            summaries = [stack.enter_context(_child(folder, _summaries, check, of_child)) for of_child in shares]
            for number, piece in enumerate(pieces):
                try:
                    total.update(next(summaries[number % nproc]))
                except _ChildDied as death:
                    total.faults.add(UNREADABLE, f"{death}; {len(records) - number * at_once:,} records were not checked")
                    break
                progress.update(len(piece))
        return total


def _summaries(store: LmdbReader, check: Check, pieces: Sequence[Sequence[Any]]) -> Iterator[Summary]:
    for piece in pieces:
        yield check(store, piece)


def read_names(folder: Path, faults: Faults) -> tuple[list[str] | None, bytes | None]:
    """The names of the records of an LMDB folder, None if it cannot be read, and its list ``__keys__``, None if it has none."""
    try:
        with _child(folder, _names) as items:
            *batches, listed = items
        return [name for batch in batches for name in batch], listed
    except WorkerFailed:
        raise
    except InputError as error:
        faults.add(UNREADABLE, str(error))
        return None, None


def _names(store: LmdbReader) -> Iterator[Any]:
    """The names in batches, then the list ``__keys__``."""
    names = store.keys()
    for first in range(0, len(names), _NAMES_AT_ONCE):
        yield names[first : first + _NAMES_AT_ONCE]
    yield bytes(store.get("__keys__")) if "__keys__" in store else None


def read_object(file: Path, faults: Faults) -> dict[str, Any] | None:
    """Read a JSON object, None if it cannot be read; a repeated key is a fault."""

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            times = Counter(key for key, _ in pairs)
            faults.add_names(f"keys that {file.name} has more than once", (key for key in fields if times[key] > 1))
        return fields

    try:
        return files.read_object(file, without_repetition)
    except InputError as error:
        faults.add(UNREADABLE, str(error))
        return None


def read_map(file: Path, meaning: str, fits: Callable[[Any], bool], faults: Faults) -> dict[str, Any] | None:
    """Read the entries of a JSON object whose value passes ``fits``; report the others as not being ``meaning``."""
    contents = read_object(file, faults)
    for key in [key for key, value in (contents or {}).items() if not fits(value)]:
        assert contents is not None
        faults.add(f"entries of {file.name} that are not {meaning}", f"{short_repr(key)} has {short_repr(contents.pop(key))}")
    return contents

"""Complete a copy of the published archives: download, verify and unpack them.

This runs before anything is installed, so it needs nothing but the standard library and ``curl``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from utils.errors import InputError, print_error
from utils.files import PARTIAL, atomic_folder, output_folder, remove_leftovers, sha256, sync_folder

ORIGINAL = "https://convaisharables.blob.core.windows.net/uniter"
_FLICKR = ("img_db/flickr30k.tar", *(f"txt_db/itm_flickr30k_{split}.db.tar" for split in ("train", "val", "test")))
_COCO = (
    *(f"img_db/coco_{part}2014.tar" for part in ("train", "val")),
    *(f"txt_db/itm_coco_{split}.db.tar" for split in ("train", "restval", "val", "test")),
)
_CHECKPOINTS = ("pretrained/uniter-base.pt", "pretrained/uniter-large.pt")
DATASETS = {"flickr": _FLICKR + _CHECKPOINTS, "coco": _COCO + _CHECKPOINTS, "all": _FLICKR + _COCO + _CHECKPOINTS}

CHECKSUMS = "SHA256SUMS"
ADVICE = "name a copy with --mirror URL, or a folder that has the file with --from DIR"
TRIES = 6  # consecutive attempts without a new byte of a file
PAUSE = 0.5  # seconds before the second try, doubled before each further one
STALL = "30"  # seconds without a byte
RETRY = ("--retry", "2", "--retry-connrefused")  # short requests only: on a retry curl discards what it has received
NOT_RESUMABLE = (33, 416)  # exit code of curl, HTTP status


class CurlError(InputError):
    """``curl`` failed: ``code`` is the HTTP status if the server refused, otherwise the exit code."""

    def __init__(self, url: str, code: int, errors: str) -> None:
        reason = re.sub(r"^curl: \(\d+\) ", "", errors.strip().rpartition("\n")[2]) or f"curl ended with code {code}"
        status = re.search(r"returned error: (\d+)", reason)
        self.code = int(status[1]) if status else code
        super().__init__(f"{url}: {reason}; {ADVICE}")


class Curl:
    """Runs ``curl``, in any thread, until it is closed. A process that outlives this program still holds the lock."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._closed = threading.Event()
        self._processes: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End all processes, those that are still to be started too."""
        self._closed.set()
        for process in self._processes:
            process.kill()

    def run(self, url: str, *options: str | Path) -> str:
        """Return what ``curl`` prints. Raises ``CurlError``."""
        limits = ("--connect-timeout", STALL, "--speed-time", STALL, "--speed-limit", "1")
        command = ("curl", "--fail", "--silent", "--show-error", "--location", "--globoff", *limits, *options, url)
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace", pass_fds=[self._lock])
        self._processes.append(process)
        if self._closed.is_set():
            process.kill()
        output, errors = process.communicate()
        if process.returncode:
            raise CurlError(url, process.returncode, errors)
        return output

    def describe(self, url: str) -> tuple[int, str]:
        """Return the size of a file and a strong ETag, else Last-Modified, else "". Raises ``InputError`` if there is none."""
        answer = self.run(url, "--head", *RETRY).strip().rpartition("\n\n")[2]  # the last one after redirections
        headers = HeaderParser().parsestr(answer.partition("\n")[2])
        kind, size, etag = headers.get_content_type(), headers.get("Content-Length", "unknown"), headers.get("ETag", "")
        if kind == "text/html" or not re.fullmatch("[1-9][0-9]{0,17}", size):
            raise InputError(f"{url}: the server sends type {kind}, length {size}; expected a file; {ADVICE}")
        return int(size), etag if etag.startswith('"') else headers.get("Last-Modified", "")

    def fetch(self, url: str, final: Path) -> Path:
        """Receive what is missing of a file; return the hidden file beside ``final`` that has it. Raises ``InputError``."""
        most = failures = 0
        while True:
            try:
                size, version = self.describe(url)
                name = hashlib.sha256(f"{url} {size} {version}".encode()).hexdigest()[:16]
                partial = final.with_name(f".{final.name}.{name}{PARTIAL}")
                if not (version and partial.exists()):
                    remove_leftovers(final.parent, final.name)
                if _received(final) != size:
                    resume = ("--continue-at", "-", "--header", f"If-Range: {version}", "--no-buffer")
                    self.run(url, *resume, "--output", partial)
                if _received(final) != size:
                    raise CurlError(url, NOT_RESUMABLE[0], f"{size:,} bytes were announced and {_received(final):,} sent")
                return partial
            except CurlError as error:
                if 400 <= error.code < 500 and error.code not in (408, 416, 429):
                    raise
                if error.code in NOT_RESUMABLE:
                    remove_leftovers(final.parent, final.name)
                failures = 1 if _received(final) > most else failures + 1
                most = max(most, _received(final))
                if failures == TRIES:
                    raise InputError(f"{error}, or rerun to resume ({TRIES} tries in a row failed)") from error
            self._closed.wait(PAUSE * 2 ** (failures - 1))


class Entry:
    """A file of the published tree, and where it comes from."""

    def __init__(self, storage: Path, path: str) -> None:
        self.path, self.final = path, storage / path
        self.folder = self.final.with_suffix("") if path.endswith(".tar") else None  # what the archive holds
        self.disk = self.final.parent if self.final.parent.is_dir() else storage  # the former may link to another disk
        self.source: Path | str = self.final  # a file or a URL
        self.size = self.needed = 0  # bytes, the latter of free space

    @property
    def is_complete(self) -> bool:
        """Whether a checkpoint is there, or what an archive holds."""
        return self.final.is_file() if self.folder is None else self.folder.is_dir() and any(self.folder.iterdir())

    def find(self, curl: Curl, mirror: str, folder: Path | None) -> None:
        """Set source and size. Raises ``InputError`` if no source has the file."""
        places = [self.final, *((folder / self.path, folder / self.final.name) if folder else ())]
        if found := next((place for place in places if place.is_file()), None):
            self.source, self.size = found, found.stat().st_size
            self.needed = self.size if found.stat().st_dev != self.disk.stat().st_dev else 0  # on one disk it is linked
        elif mirror:
            self.source = f"{mirror}/{self.path}"
            self.size, _ = curl.describe(self.source)
            self.needed = self.size - _received(self.final)
        else:
            raise InputError(f"--from {folder}: has no {self.path}; add it, or name a --mirror URL too")
        self.needed += self.size if self.folder else 0

    def fetch(self, curl: Curl) -> Path:
        """Return a file that has the contents, a hidden one unless it is in the storage already. Raises ``InputError``."""
        if self.source == self.final:
            return self.final
        self.final.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(self.source, str):
            return curl.fetch(self.source, self.final)
        remove_leftovers(self.final.parent, self.final.name)
        copy = self.final.with_name(f".{self.final.name}.copy{PARTIAL}")
        original = self.source.resolve()  # of a symbolic link what it leads to
        try:
            os.link(original, copy)
        except OSError:
            curl.run(original.as_uri(), "--output", copy)
        return copy

    def complete(self, fetching: Future[Path], checksums: Mapping[str, str]) -> None:
        """Verify and unpack what was fetched; print a line about it. Raises ``InputError``."""
        file, done = fetching.result(), []
        if file != self.final:
            expected = checksums.get(self.path, checksums.get(self.final.name))
            if expected and (actual := sha256(file)) != expected:
                file.unlink()
                raise InputError(f"{self.source}: its SHA-256 is {actual}, but {CHECKSUMS} says {expected}; rerun or {ADVICE}")
            sync_folder(file)
            os.replace(file, self.final)
            sync_folder(self.final.parent)
            done.append("fetched")
        if self.folder:
            try:
                unpack(self.final, self.folder)
            except (tarfile.TarError, OverflowError) as error:
                if done:
                    self.final.unlink()
                advice = f"it was removed, rerun or {ADVICE}" if done else "remove it to have it downloaded"
                raise InputError(f"{self.final}: damaged or unsafe archive: {error}; {advice}") from error
            done.append("unpacked")
        print(f"{self.final}: {' and '.join(done)}", flush=True)


def download(storage: Path, paths: Sequence[str], mirror: str, folder: Path | None, jobs: int) -> None:
    """Complete the files ``paths`` of the published tree in ``storage``, with ``jobs`` downloads at a time.

    Files come from ``folder`` if it has them, otherwise from the URL ``mirror``. Prints a line per completed file and an error
    per file that could not be completed. Raises ``InputError`` if anything is missing in the end.
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError("this Python cannot unpack archives safely; install 3.10.12, 3.11.4 or newer, or set PYTHON=<path>")
    entries = [Entry(storage, path) for path in paths]
    missing = [entry for entry in entries if not entry.is_complete]
    if not missing:
        print(f"{storage}: complete")
    elif folder and not folder.is_dir():
        raise InputError(f"--from {folder}: no such folder")
    elif mirror and not shutil.which("curl"):
        raise InputError("curl: no such program; install the package curl")
    with output_folder(storage), _locked(storage) as lock, ThreadPoolExecutor(jobs) as pool, closing(Curl(lock)) as curl:
        for entry in entries:
            if entry.final.is_file():
                remove_leftovers(entry.final.parent, entry.final.name)
        searches = {entry: pool.submit(entry.find, curl, mirror, folder) for entry in missing}
        found = [entry for entry, search in searches.items() if _succeeds(search.result)]
        _check_space(found)
        remote = [entry for entry in found if isinstance(entry.source, str)]
        local_sums = _checksums(curl, folder) if folder else {}
        remote_sums = _checksums(curl, mirror) if mirror and remote else {}
        pending = {pool.submit(entry.fetch, curl): entry for entry in found}
        while pending:
            for fetching in wait(pending, timeout=0.25, return_when=FIRST_COMPLETED).done:
                entry = pending.pop(fetching)
                _succeeds(entry.complete, fetching, remote_sums if entry in remote else local_sums)
            if remote and sys.stderr.isatty():
                _show_progress(remote)
        if incomplete := sum(not entry.is_complete for entry in entries):
            raise InputError(f"{storage}: {incomplete} of {len(entries)} files are missing")
        (storage / "finetune").mkdir(exist_ok=True)


def _succeeds(work: Callable[..., None], *arguments: object) -> bool:
    """Print the error if there is one."""
    try:
        work(*arguments)
    except InputError as error:
        print_error(error)
        return False
    return True


def _show_progress(entries: Sequence[Entry]) -> None:
    total = sum(entry.size for entry in entries)
    received = sum(entry.size if entry.final.is_file() else _received(entry.final) for entry in entries)
    status = f"{received / total:.1%} of {total / 1e9:,.1f} GB"  # so short that any message hides it
    print(f"{status}\x1b[K", end="\r", file=sys.stderr, flush=True)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError as error:
        raise InputError(f"{folder}: another download, or a curl that it left, is running; wait for it or stop it") from error
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}; fix this and rerun, downloads are kept") from error
    finally:
        os.close(lock)


def _check_space(entries: Sequence[Entry]) -> None:
    for disk in {entry.disk.stat().st_dev: entry.disk for entry in entries}.values():
        needed = sum(entry.needed for entry in entries if entry.disk.stat().st_dev == disk.stat().st_dev) / 1e9
        free = shutil.disk_usage(disk).free / 1e9
        if needed > free:
            raise InputError(
                f"{disk}: archives and what they hold need {needed:,.1f} GB, but only {free:,.1f} GB are free; "
                f"make room, choose flickr or coco alone, or name another STORAGE"
            )


def _checksums(curl: Curl, source: Path | str) -> dict[str, str]:
    """Return {path: hexadecimal SHA-256} from the list of a folder or a mirror; nothing if it has none."""
    name, text = f"{source}/{CHECKSUMS}", ""
    try:
        if isinstance(source, str):
            text = curl.run(name, "--max-filesize", "1000000", *RETRY)
        elif Path(name).is_file():
            text = Path(name).read_text(errors="replace")
    except CurlError as error:
        if error.code not in (403, 404, 410):  # object stores answer 403 for what a private folder lacks
            raise
    checksums = {path: digest.lower() for digest, path in re.findall(r"^([0-9a-fA-F]{64}) [ *](?:\./)?(.+)$", text, re.M)}
    if len(checksums) != len(text.splitlines()):
        raise InputError(f"{name}: not a list of SHA-256 and paths, expected the output of sha256sum")
    return checksums


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of one top folder, called like ``folder``, which appears whole or not at all. Raises ``TarError``."""

    def only_files(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo:
        parts = PurePosixPath(member.name).parts
        if not (member.isdir() or member.isreg()) or parts[:1] not in ((), (folder.name,)):
            raise tarfile.TarError(f"member {member.name!r} is not a file or folder below {folder.name}/")
        return tarfile.data_filter(member.replace(name="/".join(parts[1:]) or ".", deep=False), destination)

    with suppress(OSError):
        folder.rmdir()  # an empty one
    with atomic_folder(folder) as hidden:
        with open(archive, "rb") as file, tarfile.TarFile(fileobj=file, errorlevel=2) as tar:
            tar.extractall(hidden, filter=only_files)
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.TarError(f"it ends, or is damaged, at byte {tar.offset:,}")
        for path in hidden.rglob("*"):
            sync_folder(path)


def _received(final: Path) -> int:
    """Return the bytes received of a file that is not complete."""
    with suppress(FileNotFoundError):  # just renamed, or removed by its thread
        return sum(partial.stat().st_size for partial in final.parent.glob(f".{final.name}.*{PARTIAL}"))
    return 0

"""Download files of a web server, and resume them. Builds on ``urllib``, because it runs before anything is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from utils.errors import InputError

BLOCK = 1 << 20  # bytes per read
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 0.5  # seconds before the second try, doubled before each further one
TRIES, FILE_TRIES = 3, 6  # requests in a row that fail, or that receive nothing of a file
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
ABSENT = {403, 404, 410}  # object stores answer 403 for an absent file in a folder that may not be listed
ADVICE = "name a copy with --mirror URL, or a folder that has the file with --from DIR"

Result = TypeVar("Result")


class Refused(InputError):
    """The server does not deliver a file."""

    def __init__(self, url: str, error: HTTPError) -> None:
        super().__init__(f"{url}: the server answers {error.code} {error.reason}; {ADVICE}")
        self.status = error.code


class Retry(Exception):
    """A request failed in a way that the next one may not."""


class Changed(Retry):
    """What was received of a file cannot be continued."""


@dataclass(frozen=True)
class Version:
    """Identifies one version of a file on a server."""

    size: int  # bytes
    validator: str  # strong ETag, else Last-Modified, else ""


class Partial:
    """The hidden file ``.<name>.partial`` that is to become ``final``, and a note of which version of the file it is a part of.

    Without a note nothing is ever appended to it: it may be a hard link to a file of the user.
    """

    def __init__(self, final: Path) -> None:
        self.path = final.with_name(f".{final.name}.partial")
        self.note = final.with_name(f".{final.name}.partial.json")

    def received(self) -> tuple[int, Version]:
        """Return how many bytes are there and of which version; 0 bytes if they cannot be continued."""
        try:
            return self.path.stat().st_size, Version(**json.loads(self.note.read_bytes()))
        except (OSError, ValueError, TypeError):
            return 0, Version(0, "")

    @property
    def exists(self) -> bool:
        """Whether anything is there."""
        return self.path.exists() or self.note.exists()

    def start(self, version: Version) -> None:
        """Replace what is there by an empty file."""
        self.discard()
        self.path.touch(exist_ok=False)
        self.note.write_text(json.dumps(asdict(version)) + "\n")

    def discard(self) -> None:
        """Remove what is there."""
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Mirror:
    """The files below a URL. Methods raise ``InputError`` if the server does not deliver.

    They report bytes to ``advance`` and wait with ``pause``, both of which may raise an exception to stop them.
    """

    def __init__(self, url: str, advance: Callable[[int], None], pause: Callable[[float], None]) -> None:
        self._url = url.rstrip("/")
        self._advance = advance
        self._pause = pause

    def name(self, path: str) -> str:
        """Return the URL of a file."""
        return f"{self._url}/{path}"

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""

        def ask() -> int:
            try:
                response = _open(self.name(path), "HEAD")
            except Refused:  # not every server knows HEAD
                response = _open(self.name(path))
            with response:
                return _describe(self.name(path), response)[1].size

        return self._retry(path, ask)

    def contents(self, path: str, limit: int) -> bytes:
        """Return a file of at most ``limit`` bytes; nothing if there is no such file."""

        def ask() -> bytes:
            with _open(self.name(path)) as response, _network_errors(self.name(path)):
                contents = response.read(limit)
            if response.length:  # read() does not complain
                raise Retry(f"{response.length:,} bytes of it were not received")
            return contents

        try:
            return self._retry(path, ask)
        except Refused as refusal:
            if refusal.status not in ABSENT:
                raise
            return b""

    def fetch(self, path: str, partial: Partial) -> None:
        """Receive what is missing of a file."""
        self._retry(path, lambda: self._receive(self.name(path), partial), lambda: partial.received()[0], FILE_TRIES)

    def _retry(
        self, path: str, request: Callable[[], Result], received: Callable[[], int] = lambda: 0, tries: int = TRIES
    ) -> Result:
        most, failures = received(), 0
        while True:
            try:
                return request()
            except Retry as error:
                failures = 1 if received() > most else failures + 1
                most = max(most, received())
                if failures == tries:
                    kept = f"; {received():,} bytes are kept for the next call" if received() else ""
                    raise InputError(f"{self.name(path)}: {error}, {tries} tries in a row{kept}; {ADVICE}") from error
            self._pause(PAUSE * 2 ** (failures - 1))

    def _receive(self, url: str, partial: Partial) -> None:
        received, version = partial.received()
        if received and received == version.size:
            return
        headers = {}
        if received and version.validator:
            headers = {"Range": f"bytes={received}-", "If-Range": version.validator}
        try:
            with _open(url, headers=headers) as response:
                start, sent = _describe(url, response)
                if start == 0:
                    self._advance(-received)
                    partial.start(sent)
                elif start != received or sent not in (version, replace(version, validator="")):
                    raise Changed("the server sends a part of the file that was not asked for")
                self._append(url, response, partial, sent.size - start)
        except Changed:
            self._advance(-received)
            partial.discard()
            raise

    def _append(self, url: str, response: HTTPResponse, partial: Partial, missing: int) -> None:
        with open(partial.path, "ab") as file:
            while missing:
                with _network_errors(url):
                    block = response.read1(min(BLOCK, missing))
                if not block:
                    raise Retry(f"the connection was closed {missing:,} bytes too early")
                self._advance(len(block))
                file.write(block)
                file.flush()
                missing -= len(block)


def _open(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> HTTPResponse:
    with _network_errors(url):  # some hosts reject urllib's own user agent
        request = Request(url, method=method, headers={"User-Agent": "IAIS"} | (headers or {}))
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)
        return response


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Raise what goes wrong in the block, which must not touch the disk, as ``Refused`` or ``Retry``."""
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code == 416:
            raise Changed("the file on the server became shorter") from error
        if error.code in TRANSIENT:
            raise Retry(f"the server answers {error.code} {error.reason}") from error
        raise Refused(url, error) from error
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise Retry(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__) from error


def _describe(url: str, response: HTTPResponse) -> tuple[int, Version]:
    """Return the position in the file at which the body of a response begins, and the version of the file."""
    headers = response.headers
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if response.status == 206:
        part = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", headers.get("Content-Range", ""))
        if part is None:
            raise Changed("the server sends a part of the file and does not say which")
        return int(part[1]), Version(int(part[2]), validator)
    length = headers.get("Content-Length", "")
    kind, encoding = headers.get_content_type(), headers.get("Content-Encoding", "identity")
    if kind == "text/html" or encoding != "identity" or not re.fullmatch("[1-9][0-9]{0,17}", length):
        found = f"type {kind}, encoding {encoding}, length {length or 'unknown'}"
        raise InputError(f"{url}: the server answers with {found}; expected a file as it is, and its length; {ADVICE}")
    return 0, Version(int(length), validator)

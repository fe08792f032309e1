"""Files of a web server, fetched so that no byte that was got is asked for again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPResponse
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from scripts.download.checksums import CHECKSUMS, parse_checksums
from scripts.download.partial import BLOCK, Partial, Version
from scripts.download.work import Work
from utils.errors import InputError

TIMEOUT = 30.0  # seconds without a byte
TRIES = 6  # in a row that get no further with a file
QUESTIONS = 3  # tries for anything else
PAUSE = 0.5  # seconds before the second of them, then twice as long before each
HEADERS = {"User-Agent": "IAIS"}  # some hosts turn urllib's own away
MOST_LISTED = 1 << 20  # bytes of a list of checksums
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
ABSENT = {403, 404, 410}  # object stores answer 403 where a file is absent and its folder may not be listed
ADVICE = "name a copy with --mirror URL, or a folder that has the file with --from DIR"

Result = TypeVar("Result")


class Trouble(Exception):
    """A request went wrong in a way that it may not the next time."""


class Refused(InputError):
    """The server does not give a file."""

    def __init__(self, url: str, error: HTTPError) -> None:
        super().__init__(f"{url}: the server answers {error.code} {error.reason}; {ADVICE}")
        self.status = error.code


class Mirror:
    """The published tree below a URL; a source of files by their paths in it, such as ``img_db/flickr30k.tar``."""

    def __init__(self, url: str, work: Work) -> None:
        self._url = url.rstrip("/")
        self._work = work
        self._checksums: dict[str, str] = {}

    def read_checksums(self) -> None:
        """Read the list of checksums, if the mirror has one. Raises ``InputError`` when that cannot be told."""
        try:
            contents = self._persist(CHECKSUMS, lambda: _contents(self.name(CHECKSUMS)), QUESTIONS)
        except Refused as refusal:
            if refusal.status not in ABSENT:
                raise
        else:
            self._checksums = parse_checksums(self.name(CHECKSUMS), contents)

    def name(self, path: str) -> str:
        """The URL of a file."""
        return f"{self._url}/{path}"

    def size(self, path: str) -> int:
        """Its size in bytes."""
        return self._persist(path, lambda: _size(self.name(path)), QUESTIONS)

    def already(self, path: str, partial: Partial) -> int:
        """How many bytes of it take no more room."""
        return partial.length

    def checksum(self, path: str) -> str | None:
        """The hexadecimal SHA-256 that it should have, where that is known."""
        return self._checksums.get(path)

    def fetch(self, path: str, partial: Partial) -> None:
        """Get a file, or what is missing of it."""
        self._persist(path, lambda: self._go_on(self.name(path), partial), TRIES, lambda: partial.length)

    def _persist(self, path: str, attempt: Callable[[], Result], tries: int, got: Callable[[], int] = lambda: 0) -> Result:
        """The result of ``attempt``, made again after ``Trouble`` until it gets no further so many times in a row."""
        furthest, failures = got(), 0
        while True:
            try:
                return attempt()
            except Trouble as trouble:
                failures = 1 if got() > furthest else failures + 1
                furthest = max(furthest, got())
                if failures == tries:
                    kept = f"; {got():,} bytes are kept for the next call" if got() else ""
                    raise InputError(f"{self.name(path)}: {trouble}, {tries} tries in a row{kept}; {ADVICE}") from trouble
            self._work.pause(PAUSE * 2 ** (failures - 1))

    def _go_on(self, url: str, partial: Partial) -> None:
        """One request for what is missing of a file."""
        version, got = partial.version, partial.length
        if version and version.size == got:
            return
        headers = {}
        if version and version.validator and got:
            headers = {"Range": f"bytes={got}-", "If-Range": version.validator}
        try:
            response = _ask(url, headers=headers)
        except Refused as refusal:
            if not headers or refusal.status != 416:
                raise
            self._discard(partial)
            raise Trouble("the file there became shorter") from refusal
        with response:
            if version is None or not headers or response.status != 206:
                version = _version(url, response)
                self._discard(partial)
                partial.begin(version)
            elif not _continues(response.headers, version, got):
                self._discard(partial)
                raise Trouble("the server sent another part of the file than it was asked for")
            self._receive(url, response, partial, version.size - partial.length)

    def _receive(self, url: str, response: HTTPResponse, partial: Partial, missing: int) -> None:
        with open(partial.path, "ab", buffering=0) as file:
            while missing:
                with _network_errors(url):
                    block = response.read1(min(BLOCK, missing))
                if not block:
                    raise Trouble(f"the connection ended {missing:,} bytes too early")
                missing -= len(block)
                self._work.advance(len(block))
                while block:
                    block = block[file.write(block) :]

    def _discard(self, partial: Partial) -> None:
        self._work.advance(-partial.length)
        partial.discard()


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Raises ``Refused`` or ``Trouble`` for what goes wrong in the block, which must touch no file."""
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code in TRANSIENT:
            raise Trouble(f"the server answers {error.code} {error.reason}") from error
        raise Refused(url, error) from error
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise Trouble(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__) from error


def _ask(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> HTTPResponse:
    with _network_errors(url):
        response: HTTPResponse = urlopen(Request(url, method=method, headers=HEADERS | (headers or {})), timeout=TIMEOUT)
        return response


def _size(url: str) -> int:
    try:
        response = _ask(url, "HEAD")
    except Refused:  # some servers know GET only
        response = _ask(url)
    with response:
        return _version(url, response).size


def _contents(url: str) -> bytes:
    with _ask(url) as response, _network_errors(url):
        contents = response.read(MOST_LISTED + 1)
    if len(contents) > MOST_LISTED:
        raise InputError(f"{url}: has more than {MOST_LISTED:,} bytes, expected a list of checksums; {ADVICE}")
    return contents


def _version(url: str, response: HTTPResponse) -> Version:
    """Of a file of which the server sends all. Raises ``InputError`` when it sends something else, or not the length."""
    length = response.headers.get("Content-Length", "")
    if response.headers.get_content_type() == "text/html":
        fault = "a web page"
    elif response.status == 206:
        fault = "a part of the file"
    elif response.headers.get("Content-Encoding", "identity") != "identity":
        fault = "the file compressed"
    elif not re.fullmatch("[1-9][0-9]{0,17}", length):
        fault = "no length, without which a part cannot be told from the whole"
    else:
        return Version(int(length), _validator(response.headers))
    raise InputError(f"{url}: the server answers {response.status} with {fault}; {ADVICE}")


def _validator(headers: Message) -> str:
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _continues(headers: Message, version: Version, got: int) -> bool:
    """Whether a part that the server sends follows upon the ``got`` bytes of this version; not all servers heed If-Range."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", headers.get("Content-Range", ""))
    return (
        match is not None
        and (int(match[1]), int(match[2])) == (got, version.size)
        and _validator(headers) in ("", version.validator)
    )

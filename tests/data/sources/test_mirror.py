"""Downloads from a web server that misbehaves."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.sources import mirror
from data.sources.mirror import Mirror, Partial
from tests.web import WEAK, Fault, Site
from utils.errors import InputError

CONTENTS = random.Random(0).randbytes(30_000)
OTHER = random.Random(1).randbytes(30_000)
CUT = Fault(sent=10_000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site() as server:
        server.files["file"] = CONTENTS
        yield server


class Download(Mirror):
    """A download of the site's file, which notes its progress and does not pause."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.partial = Partial(folder / "file")
        self.counts: list[int] = []
        self.pauses: list[float] = []
        super().__init__(site.url, self.counts.append, self.pauses.append)

    def run(self) -> bytes:
        self.fetch("file", self.partial)
        return self.partial.path.read_bytes()


@pytest.fixture
def download(site: Site, tmp_path: Path) -> Download:
    return Download(site, tmp_path)


def part(first: int, last: int, size: int) -> Fault:
    return Fault(206, headers={"Content-Range": f"bytes {first}-{last}/{size}"})


UNNAMED = Fault(sent=10_000, headers={"ETag": None, "Last-Modified": None})
WEAKLY = Fault(sent=10_000, headers={"ETag": WEAK})
LATER = "bytes=10000-"


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        pytest.param([CUT, *[Fault(sent=500)] * 12], [None, *(f"bytes={n}-" for n in range(10_000, 16_001, 500))], id="often"),
        pytest.param([Fault(503), CUT, *map(Fault, (503, 429, 500, 504))], [None, None, *[LATER] * 5], id="busy"),
        pytest.param([CUT, Fault(ranges=False)], [None, LATER], id="no ranges"),
        pytest.param([CUT, Fault(416)], [None, LATER, None], id="unsatisfiable"),
        pytest.param([CUT, Fault(206)], [None, LATER, None], id="any part"),
        pytest.param([CUT, part(9, 29_999, 30_000)], [None, LATER, None], id="another part"),
        pytest.param([CUT, part(10_000, 29_998, 29_999)], [None, LATER, None], id="another size"),
        pytest.param([WEAKLY, WEAKLY, Fault(headers={"ETag": WEAK})], [None, LATER, "bytes=20000-"], id="weak ETag"),
        pytest.param([UNNAMED, UNNAMED], [None, None, None], id="no ETag"),
        pytest.param([Fault(sent=10_000, headers={"Content-Length": "40000"})], [None, LATER, None], id="wrong length"),
        pytest.param([Fault(sent=10_000, stalls=True)], [None, LATER], id="stall"),
    ],
)
def test_a_broken_download_is_resumed(
    site: Site, download: Download, monkeypatch: pytest.MonkeyPatch, faults: list[Fault], ranges: list[str | None]
) -> None:
    monkeypatch.setattr(mirror, "TIMEOUT", 0.2)
    site.faults["file"].extend(faults)
    assert download.run() == CONTENTS
    assert site.ranges("file") == ranges
    assert sum(download.counts) == len(CONTENTS)


def test_what_was_received_is_kept(site: Site, download: Download, tmp_path: Path) -> None:
    site.faults["file"].extend([Fault(sent=12_000), *[Fault(sent=0)] * 5])
    with pytest.raises(InputError, match="closed 18,000 bytes too early, 6 tries in a row; 12,000 bytes are kept"):
        download.run()
    assert download.pauses == [0.5, 1, 2, 4, 8]
    download = Download(site, tmp_path)
    assert download.run() == CONTENTS
    assert site.ranges("file")[6:] == ["bytes=12000-"]
    assert sum(download.counts) == 18_000
    assert download.run() == CONTENTS
    assert len(site.requests) == 7


def test_a_server_that_always_lies_about_the_length(site: Site, download: Download) -> None:
    site.always = Fault(headers={"Content-Length": "30001"}, ranges=False)
    with pytest.raises(InputError, match="closed 1 bytes too early, 6 tries in a row"):
        download.run()


@pytest.mark.parametrize("heeded", [True, False])
def test_a_file_that_changed_is_downloaded_anew(site: Site, download: Download, heeded: bool) -> None:
    site.faults["file"].extend([Fault(sent=12_000), Fault(404)])
    with pytest.raises(InputError, match=f"^{site.url}/file: the server answers 404 Not Found; name a copy with --mirror"):
        download.run()
    site.files["file"] = OTHER
    if not heeded:  # the server sends the rest of the new file, whatever If-Range says
        fault = part(12_000, 29_999, 30_000)
        site.faults["file"].append(fault._replace(headers=fault.headers | {"ETag": '"new"'}))
    assert download.run() == OTHER
    assert site.ranges("file")[2:] == ["bytes=12000-"] + [None] * (not heeded)


@pytest.mark.parametrize("note", [None, b"{", b"[]", b'{"size": 30000}'])
def test_a_part_of_an_unknown_file_is_replaced(site: Site, download: Download, tmp_path: Path, note: bytes | None) -> None:
    users = tmp_path / "a file of the user"
    users.write_bytes(OTHER[:5000])
    download.partial.path.hardlink_to(users)
    if note is not None:
        download.partial.note.write_bytes(note)
    assert download.run() == CONTENTS
    assert users.read_bytes() == OTHER[:5000]
    assert json.loads(download.partial.note.read_bytes())["size"] == 30_000


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(409), "the server answers 409 Conflict; name a copy with --mirror URL, or a folder"),
        (Fault(503), "the server answers 503 Service Unavailable, 3 tries in a row; name a copy"),
        (Fault(206), "the server sends a part of the file and does not say which, 3 tries in a row"),
        (Fault(headers={"Content-Length": None}), "length unknown; expected"),
        (Fault(headers={"Content-Length": "0"}), "length 0; expected"),
        (Fault(headers={"Content-Encoding": "gzip"}), "encoding gzip, length 30000; expected"),
        (Fault(headers={"Content-Type": "text/html; charset=utf-8"}), "type text/html, "),
    ],
)
def test_the_size_is_not_known(site: Site, download: Download, fault: Fault, message: str) -> None:
    assert download.size("file") == 30_000
    site.always = fault
    with pytest.raises(InputError, match=f"{site.url}/file: .*{message}"):
        download.size("file")


def test_a_server_without_head(site: Site, download: Download) -> None:
    site.knows_head = False
    assert download.size("file") == 30_000


def test_small_files(site: Site, download: Download) -> None:
    site.faults["file"].extend([CUT, Fault(503)])
    assert download.contents("file", 30_000) == CONTENTS
    assert download.contents("absent", 30_000) == b""
    with pytest.raises(InputError, match="file: 1 bytes of it were not received, 3 tries in a row"):
        download.contents("file", 29_999)
    site.always = Fault(401)
    with pytest.raises(InputError, match="the server answers 401"):
        download.contents("file", 30_000)

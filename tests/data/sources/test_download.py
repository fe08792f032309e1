"""Downloads from a web server that misbehaves, and archives that are truncated or hostile."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.sources import download
from tests.web import Fault, Site
from utils.errors import InputError

CONTENTS, OTHER = random.Random(0).randbytes(30_000), random.Random(1).randbytes(30_000)
CUT, LATER = Fault(sent=10_000), "bytes=10000-"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "STALL", "1")
    with Site() as server:
        server.files["file"] = CONTENTS
        yield server


@pytest.fixture
def fetch(site: Site, tmp_path: Path) -> Callable[[], bytes]:
    """Fetch the site's file, without pauses; its partial download is the only file then."""

    def call() -> bytes:
        file = download.Curl(0).fetch(f"{site.url}/file", tmp_path / "model.pt")
        assert list(tmp_path.iterdir()) == [file]
        return file.read_bytes()

    return call


@pytest.mark.parametrize(
    ("faults", "always", "ranges"),
    [
        pytest.param(
            [CUT, *[Fault(sent=500)] * 9], {}, [None, *(f"bytes={n}-" for n in range(10_000, 14_501, 500))], id="often"
        ),
        pytest.param([Fault(503), CUT, *map(Fault, (503, 429, 500, 504))], {}, [None, None, *[LATER] * 5], id="busy"),
        pytest.param([Fault(302, headers={"Location": "/uniter/file"}), CUT], {}, [None, None, LATER], id="redirected"),
        pytest.param([CUT, Fault(ranges=False)], {}, [None, LATER, None], id="no ranges"),
        pytest.param([CUT, Fault(416)], {}, [None, LATER, None], id="unsatisfiable"),
        pytest.param([CUT, Fault(206)], {}, [None, LATER, None], id="any part"),
        pytest.param([CUT], {"ETag": None, "Last-Modified": "Sun, 01 Sep 2019 12:00:00 GMT"}, [None, LATER], id="no ETag"),
        pytest.param([CUT], {"ETag": 'W/"1"'}, [None, None], id="no strong ETag"),
        pytest.param([Fault(sent=10_000, headers={"Content-Length": "10000"})], {}, [None, None], id="wrong length"),
        pytest.param([Fault(sent=10_000, stalls=True)], {}, [None, LATER], id="stall"),
    ],
)
def test_a_broken_download_is_resumed(
    site: Site, fetch: Callable[[], bytes], faults: list[Fault], always: dict[str, str | None], ranges: list[str | None]
) -> None:
    site.always = Fault(headers=always)
    site.faults["file"].extend(faults)
    assert fetch() == CONTENTS
    assert site.ranges("file") == ranges


def test_what_was_received_is_kept_unless_the_file_changed(site: Site, fetch: Callable[[], bytes]) -> None:
    site.faults["file"].extend([Fault(sent=12_000), *[Fault(sent=0)] * 5])
    with pytest.raises(
        InputError, match="with 18000 bytes remaining to read, 6 tries in a row; rerun to resume, or name a copy"
    ):
        fetch()
    assert fetch() == CONTENTS
    assert site.ranges("file")[6:] == ["bytes=12000-"]
    assert fetch() == CONTENTS
    assert len(site.ranges("file")) == 7
    site.files["file"] = OTHER
    site.faults["file"].extend([CUT, Fault(404)])
    with pytest.raises(
        InputError, match=f"^{site.url}/file: The requested URL returned error: 404; name a copy with --mirror URL, or a folder"
    ):
        fetch()
    site.files["file"] = CONTENTS
    assert fetch() == CONTENTS
    assert site.ranges("file")[7:] == [None, LATER, None]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(409), "The requested URL returned error: 409; name a copy"),
        (Fault(headers={"Content-Length": None}), "length unknown; expected a file; name a copy"),
        (Fault(headers={"Content-Length": "0"}), "length 0; expected"),
        (Fault(headers={"Content-Type": "text/html; charset=utf-8"}), "sends type text/html, "),
    ],
)
def test_no_file(site: Site, fetch: Callable[[], bytes], fault: Fault, message: str) -> None:
    site.always = fault
    with pytest.raises(InputError, match=f"^{site.url}/file: .*{message}"):
        fetch()


def archive(folder: Path, members: list[tuple[str, bytes, str]], contents: bytes = b"") -> tuple[Path, int]:
    """Write top.tar with members of these names, types and link targets; return it and the position of the mark at its end."""
    with tarfile.open(folder / "top.tar", "w") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(contents) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(contents))
        return folder / "top.tar", tar.offset


def refused(file: Path) -> str:
    """Return why an archive is refused, of which nothing must be left."""
    with pytest.raises(tarfile.TarError) as error:
        download.unpack(file, file.with_suffix(""))
    assert list(file.parent.iterdir()) == [file]
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "kind", "target", "message"),
    [
        ("../evil", tarfile.REGTYPE, "", "'../evil' is not a file or folder below top/"),
        ("top/../../evil", tarfile.REGTYPE, "", "would be extracted to"),
        ("/tmp/evil", tarfile.REGTYPE, "", "'/tmp/evil' is not"),
        ("topmost/x", tarfile.REGTYPE, "", "'topmost/x' is not"),
        ("top/x", tarfile.SYMTYPE, "/etc", "'top/x' is not"),
        ("top/x", tarfile.LNKTYPE, "top/good", "'top/x' is not"),
        ("top/x", tarfile.CHRTYPE, "", "'top/x' is not"),
        ("top/x", tarfile.FIFOTYPE, "", "'top/x' is not"),
    ],
)
def test_hostile_archives(tmp_path: Path, name: str, kind: bytes, target: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    file, _ = archive(tmp_path / "in", [("top/good", tarfile.REGTYPE, ""), (name, kind, target)])
    assert message in refused(file)
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil").exists()


def test_an_archive_truncated_anywhere(tmp_path: Path) -> None:
    names = ["a", "x" * 90 + "/" + "y" * 150, "last"]
    members = [("./top", tarfile.DIRTYPE, ""), *((f"./top/{name}", tarfile.REGTYPE, "") for name in names)]
    file, end = archive(tmp_path, members, CONTENTS[:700])
    whole = file.read_bytes()
    for cut in sorted({block + more for block in range(0, end + 1024, 512) for more in (0, 1, 300)}):
        file.write_bytes(whole[:cut])
        refused(file)
    file.write_bytes(whole[: end + 1024])
    download.unpack(file, tmp_path / "top")
    assert all((tmp_path / "top" / name).read_bytes() == CONTENTS[:700] for name in names)

"""scripts/download_itm.sh against a web server that behaves badly, and archives that do."""

from __future__ import annotations

import hashlib
import io
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from scripts import download_itm
from scripts.download import mirror as mirror_module
from scripts.download.archive import Damaged, unpack
from scripts.download_itm import CHOICES, main
from tests.conftest import BUNDLED
from tests.processes import ROOT

SCRIPT = ROOT / "scripts/download_itm.sh"
BASE, LARGE = "pretrained/uniter-base.pt", "pretrained/uniter-large.pt"
WEAK = 'W/"1"'
IMAGES, TEST = "img_db/flickr30k.tar", "txt_db/itm_flickr30k_test.db.tar"


# ---- a web server, and what it has


class Fault(NamedTuple):
    """What a server does wrong in answer to one request for a file's contents."""

    status: int = 0
    sent: int = -1  # bytes after which it closes the connection; all if negative
    stalls: bool = False  # instead of closing it
    headers: dict[str, str | None] = {}  # noqa: RUF012  (None: without)
    ranges: bool = True


class Site(ThreadingHTTPServer):
    """Serves ``files`` below /uniter; each request for contents uses up one of the path's ``faults``."""

    daemon_threads = True
    always = Fault()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[tuple[str, str, str | None]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/uniter"

    def got(self, path: str) -> list[str | None]:
        """The ranges of the requests for the contents of a file."""
        return [asked for method, name, asked in self.requests if (method, name) == ("GET", path)]

    def handle_error(self, *_: object) -> None:
        """A client that went away is no error."""


class Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(Fault(headers=self.server.always.headers, status=self.server.always.status))

    def do_GET(self) -> None:
        faults = self.server.faults[self.name]
        self.answer(faults.popleft() if faults else self.server.always)

    @property
    def name(self) -> str:
        return self.path.split("/uniter/", 1)[-1]  # of a proxy all of the URL is asked

    def answer(self, fault: Fault) -> None:
        asked = self.headers["Range"]
        self.server.requests.append((self.command, self.name, asked))
        contents = self.server.files.get(self.name)
        status = fault.status or (404 if contents is None else 200)
        headers: dict[str, str | None] = {}
        body = b""
        if status == 200:
            assert contents is not None
            body = contents
            headers = {"ETag": f'"{hashlib.md5(contents).hexdigest()}"', "Last-Modified": "Sun, 01 Sep 2019 12:00:00 GMT"}
            headers |= fault.headers
            strong = {headers["ETag"], headers["Last-Modified"]} - {WEAK}
            if asked and fault.ranges and self.headers["If-Range"] in strong:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
                status, body = 206, contents[start:]
                headers["Content-Range"] = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
        headers = {"Content-Length": str(len(body))} | headers | fault.headers
        self.send_response(status)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.wfile.write(body if fault.sent < 0 else body[: fault.sent])
            self.wfile.flush()
            if fault.stalls:
                self.server.released.wait(20)


def archive_of(folder: Path | dict[str, bytes], top: str) -> bytes:
    """A tar archive of a folder, or of files with these contents, below ``top``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if isinstance(folder, Path):
            tar.add(folder, top)
        else:
            for name, contents in folder.items():
                member = tarfile.TarInfo(f"{top}/{name}" if name else top)
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    return buffer.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def published() -> dict[str, bytes]:
    """Small stand-ins for all that is published."""
    files = {}
    for number, path in enumerate(CHOICES["all"]):
        top = Path(path).stem
        contents = {"data.mdb": noise(9000, number), "deep/nbb.json": b"{}", "empty": b""}
        files[path] = archive_of(contents, top) if path.endswith(".tar") else noise(30_000, number)
    return files


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(contents).hexdigest()}  {path}\n" for path, contents in files.items()).encode()


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, hidden or not: {path: contents, None for a folder}."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def expected(files: dict[str, bytes], dataset: str = "all") -> dict[str, bytes | None]:
    """The tree that a download of ``files`` leaves."""
    found: dict[str, bytes | None] = {"finetune": None, "pretrained": None, "img_db": None, "txt_db": None}
    for path in CHOICES[dataset]:
        found[path] = files[path]
        if path.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(files[path])) as tar:
                for member in tar:
                    place = Path(path).parent / member.name
                    found |= {str(parent): None for parent in place.parents if str(parent) != "."}
                    file = tar.extractfile(member)
                    found[str(place)] = file.read() if file else None
    return found


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(mirror_module, "PAUSE", 0.001)
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.files = published()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "the storage"


Fetch = Callable[..., list[str]]


@pytest.fixture
def fetch(site: Site, storage: Path, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """Calls ``main`` for flickr with these options, --mirror of the site if none; the lines of a failure, none of a success."""

    def call(*options: object, code: int = 0) -> list[str]:
        arguments = [str(storage), "flickr", *map(str, options or ("--mirror", site.url))]
        if code:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == code
        else:
            main(arguments)
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        assert bool(lines) == bool(code)
        assert not (storage / ".download.lock").exists()
        return lines

    return call


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The real thing."""
    words = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    return output, errors


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def partial(storage: Path, path: str) -> Path:
    return (storage / path).with_name(f".{Path(path).name}.partial")


# ---- what it is for


def test_the_published_tree(site: Site, storage: Path) -> None:
    site.files[IMAGES] = archive_of(BUNDLED.image_db, "flickr30k")
    site.files[TEST] = archive_of(BUNDLED.text_db, "itm_flickr30k_test.db")
    site.files["SHA256SUMS"] = sums(site.files)
    site.faults[IMAGES].append(Fault(sent=70_000))
    site.faults[TEST].append(Fault(500))
    output, errors = finish(start(storage, "--mirror", site.url))
    assert errors == ""
    assert sorted(output.splitlines()) == sorted(
        f"{storage / path}: fetched{' and unpacked' * path.endswith('.tar')}" for path in CHOICES["all"]
    )
    assert tree(storage) == expected(site.files)
    assert site.got(IMAGES) == [None, "bytes=70000-"]

    texts = TextDatabase(storage / "txt_db/itm_flickr30k_test.db")
    original = TextDatabase(BUNDLED.text_db)
    assert list(texts.ids) == list(original.ids)
    assert texts[texts.ids[-1]].input_ids.tolist() == original[original.ids[-1]].input_ids.tolist()
    texts.close()
    original.close()
    images, original_images = ImageDatabase(storage / "img_db/flickr30k"), ImageDatabase(BUNDLED.image_db)
    name = original_images.names()[0]
    assert (images[name].features == original_images[name].features).all()
    images.close()
    original_images.close()

    site.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}
    assert finish(start(storage, "all", "--mirror", site.url, "--jobs", 2)) == (f"{storage}: complete\n", "")
    assert finish(start(storage, "--from", "/", "coco")) == (f"{storage}: complete\n", "")
    assert site.requests == []
    assert before == {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}


@pytest.mark.parametrize("dataset", ["flickr", "coco"])
def test_one_dataset(site: Site, storage: Path, dataset: str) -> None:
    main([str(storage), "--mirror", f"{site.url}/", dataset, "--jobs", "1"])
    assert tree(storage) == expected(site.files, dataset)
    assert {name for method, name, _ in site.requests if method == "HEAD"} == set(CHOICES[dataset])


def test_only_what_is_missing_is_asked_for(site: Site, storage: Path, fetch: Fetch) -> None:
    fetch()
    for folder in storage.glob("txt_db/*.db"):
        shutil.rmtree(folder)
        folder.mkdir()  # an empty one counts for nothing
    (storage / IMAGES).unlink()
    partial(storage, IMAGES).write_bytes(b"begun, before someone put the folder there")
    site.requests.clear()
    fetch()  # archives are unpacked again; a folder needs no archive
    assert site.requests == []
    assert IMAGES not in tree(storage)
    (storage / IMAGES).write_bytes(site.files[IMAGES])
    assert tree(storage) == expected(site.files, "flickr")
    partial(storage, BASE).write_bytes(b"begun, before someone put the file there")
    fetch()
    assert site.requests == []
    assert tree(storage) == expected(site.files, "flickr")
    (storage / BASE).unlink()
    fetch()
    assert {name for _, name, _ in site.requests} == {BASE, "SHA256SUMS"}


def test_a_proxy_of_the_environment(site: Site, storage: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies
    monkeypatch.setenv("http_proxy", site.url.removesuffix("/uniter"))
    fetch("--mirror", "http://mirror.invalid/uniter")
    assert tree(storage) == expected(site.files, "flickr")


# ---- a server that does not give a file


def test_a_host_that_refuses(site: Site, storage: Path) -> None:
    site.always = Fault(409)
    output, errors = finish(start(storage, "flickr", "--mirror", site.url), 2)
    lines = errors.splitlines()
    assert output == ""
    assert sorted(lines) == sorted(
        f"error: {site.url}/{path}: the server answers 409 Conflict; name a copy with --mirror URL, "
        f"or a folder that has the file with --from DIR"
        for path in CHOICES["flickr"]
    )
    assert not storage.exists()


def test_files_that_are_there_stay_when_others_are_not(site: Site, storage: Path, fetch: Fetch) -> None:
    missing = {path: site.files.pop(path) for path in (TEST, LARGE)}
    lines = fetch(code=2)
    assert len(lines) == 2
    assert all(any(f"{path}: the server answers 404 Not Found; name a copy" in line for line in lines) for path in missing)
    kept = {path for path, contents in tree(storage).items() if contents is not None and path in CHOICES["all"]}
    assert kept == set(CHOICES["flickr"]) - set(missing)
    site.files |= missing
    site.requests.clear()
    fetch()
    assert tree(storage) == expected(site.files, "flickr")
    assert {name for _, name, _ in site.requests} == {*missing, "SHA256SUMS"}


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (0, {"Content-Length": None}, "200 with no length"),
        (0, {"Content-Length": "0"}, "200 with no length"),
        (0, {"Content-Encoding": "gzip"}, "200 with the file compressed"),
        (0, {"Content-Type": "text/html; charset=utf-8"}, "200 with a web page"),
        (206, {"Content-Length": "10"}, "206 with a part of the file"),
    ],
)
def test_an_answer_that_cannot_be_used(
    site: Site, storage: Path, fetch: Fetch, status: int, headers: dict[str, str | None], message: str
) -> None:
    site.always = Fault(status, headers=headers)
    lines = fetch(code=2)
    assert len(lines) == len(CHOICES["flickr"])
    assert all(f"the server answers {message}" in line for line in lines)
    assert not storage.exists()


def test_no_server(storage: Path, fetch: Fetch) -> None:
    lines = fetch("--mirror", "http://127.0.0.1:9/uniter", code=2)
    assert len(lines) == len(CHOICES["flickr"])
    assert all("uniter-" in line or ": Connection refused, 3 tries in a row; name a copy" in line for line in lines)


def test_a_server_that_has_no_head(site: Site, storage: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.send_error(405))
    fetch()
    assert tree(storage) == expected(site.files, "flickr")


# ---- connections that break


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([Fault(sent=10_000)] + [Fault(sent=500)] * 12, [None, *(f"bytes={10_000 + 500 * n}-" for n in range(13))]),
        ([Fault(503), Fault(sent=10_000), *map(Fault, (503, 429, 500, 504))], [None, None, *["bytes=10000-"] * 5]),
        ([Fault(sent=10_000), Fault(ranges=False)], [None, "bytes=10000-"]),
        ([Fault(sent=10_000), Fault(416)], [None, "bytes=10000-", None]),
        (
            [*[Fault(sent=10_000, headers={"ETag": WEAK})] * 2, Fault(headers={"ETag": WEAK})],
            [None, "bytes=10000-", "bytes=20000-"],
        ),
        ([Fault(sent=10_000, headers={"ETag": None, "Last-Modified": None})] * 2, [None, None, None]),
        ([Fault(sent=10_000), Fault(206, headers={"Content-Range": "bytes 9-29999/30000"})], [None, "bytes=10000-", None]),
        ([Fault(sent=10_000), Fault(206)], [None, "bytes=10000-", None]),
        ([Fault(sent=10_000, headers={"Content-Length": "40000"})], [None, "bytes=10000-", None]),
        ([Fault(sent=10_000, stalls=True)], [None, "bytes=10000-"]),
    ],
    ids=["often", "busy", "ignored", "416", "weak", "none", "elsewhere", "bare", "lie", "stall"],
)
def test_a_download_goes_on(
    site: Site, storage: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, faults: list[Fault], ranges: list[str | None]
) -> None:
    monkeypatch.setattr(mirror_module, "TIMEOUT", 0.2)
    site.faults[BASE].extend(faults)
    begun = time.monotonic()
    fetch()
    assert time.monotonic() - begun < 10
    assert tree(storage) == expected(site.files, "flickr")
    assert site.got(BASE) == ranges


def test_what_was_got_is_kept_for_the_next_call(site: Site, storage: Path, fetch: Fetch) -> None:
    site.faults[BASE].extend([Fault(sent=12_000), *[Fault(sent=0)] * 5])
    (line,) = fetch(code=2)
    assert f"{site.url}/{BASE}: the connection ended 18,000 bytes too early, 6 tries in a row" in line
    assert "12,000 bytes are kept for the next call" in line
    assert partial(storage, BASE).read_bytes() == site.files[BASE][:12_000]
    assert not (storage / BASE).exists()
    fetch()
    assert site.got(BASE)[-1] == "bytes=12000-"
    assert tree(storage) == expected(site.files, "flickr")


@pytest.mark.parametrize("heeded", [True, False])
def test_a_file_that_changed_is_begun_anew(site: Site, storage: Path, fetch: Fetch, heeded: bool) -> None:
    site.faults[BASE].extend([Fault(sent=12_000), Fault(404)])
    fetch(code=2)
    site.files[BASE] = noise(30_000, 99)
    if not heeded:  # the server goes on with the new file, whatever If-Range says
        size = {"Content-Range": "bytes 12000-29999/30000", "ETag": '"new"'}
        site.faults[BASE].append(Fault(206, headers=size))
    fetch()
    assert site.got(BASE)[2:] == ["bytes=12000-"] + [None] * (not heeded)
    assert tree(storage) == expected(site.files, "flickr")


def test_a_server_that_always_lies_about_the_length(site: Site, storage: Path, fetch: Fetch) -> None:
    site.faults[BASE].extend([Fault(headers={"Content-Length": "30001"}, ranges=False)] * 6)
    (line,) = fetch(code=2)
    assert "the connection ended 1 bytes too early, 6 tries in a row" in line
    assert not (storage / BASE).exists()


# ---- verification


def test_checksums(site: Site, storage: Path, fetch: Fetch) -> None:
    site.files["SHA256SUMS"] = sums(site.files).replace(b"  ", b" *./").upper().replace(b"IMG_DB", b"img_db")
    fetch("--mirror", site.url)  # of paths that are not in the list nothing is known
    site.files["SHA256SUMS"] = sums(site.files)
    (storage / BASE).unlink()
    (storage / LARGE).unlink()
    true, site.files[BASE] = site.files[BASE], noise(30_000, 99)
    (line,) = fetch(code=2)
    wrong, right = (hashlib.sha256(contents).hexdigest() for contents in (site.files[BASE], true))
    assert f"{site.url}/{BASE}: its SHA-256 is {wrong}, but SHA256SUMS says {right}; what was fetched is removed again" in line
    assert set(tree(storage / "pretrained")) == {"uniter-large.pt"}
    site.files[BASE] = true
    fetch()
    assert tree(storage) == expected(site.files, "flickr")


@pytest.mark.parametrize(
    ("contents", "status", "message"),
    [(b"<html>", 0, "SHA256SUMS: line 1 is not a SHA-256 and a path"), (b"", 401, "SHA256SUMS: the server answers 401")],
)
def test_a_list_of_checksums_that_cannot_be_read(
    site: Site, storage: Path, fetch: Fetch, contents: bytes, status: int, message: str
) -> None:
    site.files["SHA256SUMS"] = contents
    site.faults["SHA256SUMS"].append(Fault(status))
    (line,) = fetch(code=2)
    assert message in line
    assert not storage.exists()


def test_an_archive_that_is_refused_is_removed(site: Site, storage: Path, fetch: Fetch) -> None:
    true, site.files[TEST] = site.files[TEST], archive_of({"data.mdb": b"1"}, "itm_flickr30k_val.db")
    (line,) = fetch(code=2)
    assert (
        f"{storage / TEST}: member 'itm_flickr30k_val.db/data.mdb' is not below itm_flickr30k_test.db/; it is removed" in line
    )
    assert "itm_flickr30k_test.db" not in " ".join(tree(storage))
    (storage / TEST).write_bytes(true[:-10_000])  # as other programs leave them
    (line,) = fetch(code=2)
    assert "remove it, and it is fetched" in line
    (storage / TEST).unlink()  # which only their owner does
    site.files[TEST] = true
    fetch()
    assert tree(storage) == expected(site.files, "flickr")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("../evil")], r"'\.\./evil' leads out"),
        ([member("top/../../evil")], "leads out"),
        ([member("/tmp/evil")], r"'/tmp/evil' leads out"),
        ([member("top/x", tarfile.SYMTYPE, "/etc")], "'top/x' is a symbolic link"),
        ([member("top/x", tarfile.SYMTYPE, "..")], "'top/x' is a symbolic link"),
        ([member("top/x"), member("top/y", tarfile.LNKTYPE, "top/x")], "'top/y' is a hard link"),
        ([member("top/x", tarfile.CHRTYPE)], "'top/x' is a device"),
        ([member("top/x", tarfile.BLKTYPE)], "'top/x' is a device"),
        ([member("top/x", tarfile.FIFOTYPE)], "'top/x' is a pipe"),
        ([member("top/x", b"Z")], "'top/x' is of an unknown kind"),
        ([member("top/x"), member("other/x")], "'other/x' is not below top/"),
        ([member("top")], "'top' is not below top/"),
        ([member("topmost/x")], "'topmost/x' is not below top/"),
        ([member("top/x"), member("./top/x")], r"'\./top/x' occurs twice"),
        ([member("top/x"), member("top/x/y")], "'top/x/y' occurs twice"),
        ([member("top/x"), member("top/x", tarfile.DIRTYPE)], "'top/x' occurs twice"),
        ([member("top", tarfile.DIRTYPE)], "holds no file of top/"),
        ([], "holds no file of top/"),
        ([member("top/x", size=-512)], "'top/x' has -512 bytes"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_archives(tmp_path: Path, members: list[tarfile.TarInfo], message: str, form: int) -> None:
    content = b"".join(info.tobuf(tarfile.GNU_FORMAT if info.size < 0 else form) for info in members) + bytes(10240)
    (tmp_path / "top.tar").write_bytes(content)
    with pytest.raises(Damaged, match=message) as refused:
        unpack(tmp_path / "top.tar", tmp_path / "top", lambda _: None)
    assert str(refused.value).startswith(f"{tmp_path / 'top.tar'}: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "top.tar"]
    assert not (tmp_path.parent / "evil").exists()
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_that_is_cut_off_anywhere(tmp_path: Path, form: int) -> None:
    buffer = io.BytesIO()
    long = "x" * 90 + "/" + "y" * (150 if form != tarfile.USTAR_FORMAT else 90)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in ("./", "./top", "./top/a", f"./top/{long}", "./top/last"):
            info = member(name, tarfile.REGTYPE if name.count("/") > 1 else tarfile.DIRTYPE, size=700 * (name.count("/") > 1))
            tar.addfile(info, io.BytesIO(noise(info.size)))
        end = tar.offset
    whole = buffer.getvalue()
    archive, folder = tmp_path / "top.tar", tmp_path / "top"
    cuts = {cut for block in range(0, end + 1024, 512) for cut in (block, block + 1, block + 300)}
    for cut in sorted(cut for cut in cuts if cut < end + 1024):
        archive.write_bytes(whole[:cut])
        with pytest.raises(Damaged, match=re.escape(str(archive))):
            unpack(archive, folder, lambda _: None)
    assert list(tmp_path.iterdir()) == [archive]
    counts: list[int] = []
    archive.write_bytes(whole[: end + 1024])
    unpack(archive, folder, counts.append)
    assert {name: value for name, value in tree(folder).items() if value} == dict.fromkeys(("a", long, "last"), noise(700))
    assert sum(counts) == 2100


def test_an_archive_with_wrong_bytes(tmp_path: Path) -> None:
    """Whatever is in it, it is refused or unpacked, and nothing is left beside."""
    whole = archive_of({"a": noise(700), "b/c": noise(100), "d" * 120: b"1"}, "top")
    archive, chance = tmp_path / "top.tar", random.Random(0)
    refused = 0
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 50))):
            damaged[chance.randrange(len(whole) - 7000)] = chance.randrange(256)
        archive.write_bytes(damaged)
        try:
            unpack(archive, tmp_path / "top", lambda _: None)
        except Damaged:
            refused += 1
            assert list(tmp_path.iterdir()) == [archive]
        else:
            shutil.rmtree(tmp_path / "top")
    assert 20 < refused < 80


# ---- a local folder


def lay_out(folder: Path, files: dict[str, bytes], flat: bool) -> Path:
    for path, contents in files.items():
        place = folder / (Path(path).name if flat else path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(contents)
    return folder


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_from_a_folder(
    site: Site, storage: Path, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: bool, linked: bool
) -> None:
    folder = lay_out(tmp_path / "here", site.files, flat)
    (folder / "SHA256SUMS").write_bytes(sums({Path(path).name if flat else path: site.files[path] for path in site.files}))
    if not linked:

        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    fetch("--from", folder)
    assert tree(storage) == expected(site.files, "flickr")
    given = folder / (Path(BASE).name if flat else BASE)
    assert given.samefile(storage / BASE) == linked
    assert site.requests == []


def test_a_symbolic_link_is_followed(site: Site, storage: Path, fetch: Fetch, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "elsewhere", site.files, True)
    links = tmp_path / "here"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(f"../elsewhere/{path.name}")
    fetch("--from", links)
    assert not (storage / BASE).is_symlink()
    assert tree(storage) == expected(site.files, "flickr")


def test_what_a_folder_lacks(site: Site, storage: Path, fetch: Fetch, tmp_path: Path) -> None:
    some = {path: contents for path, contents in site.files.items() if path not in (TEST, LARGE)}
    folder = lay_out(tmp_path / "here", some, False)
    (line,) = fetch("--from", folder, code=2)
    assert line == f"error: --from {folder}: has no {TEST}, {LARGE}; add them, or name a --mirror URL too"
    assert not {TEST, LARGE, "finetune"} & tree(storage).keys()
    assert (storage / BASE).samefile(folder / BASE)
    (line,) = fetch("--from", tmp_path / "nowhere", code=2)
    assert line == f"error: --from {tmp_path / 'nowhere'}: cannot be read (No such file or directory), expected a folder"
    (storage / BASE).unlink()
    fetch("--from", folder, "--mirror", site.url)
    assert tree(storage) == expected(site.files, "flickr")
    assert {name for _, name, _ in site.requests} == {TEST, LARGE, "SHA256SUMS"}


def test_files_of_the_user_are_never_changed(site: Site, storage: Path, fetch: Fetch, tmp_path: Path) -> None:
    files = site.files | {TEST: site.files[TEST][:3000], BASE: site.files[BASE][:5000]}
    folder = lay_out(tmp_path / "here", files, False)
    (folder / "SHA256SUMS").write_bytes(sums({BASE: site.files[BASE]}))
    lines = fetch("--from", folder, code=2)
    assert len(lines) == 2
    assert any(f"{folder / BASE}: its SHA-256 is" in line for line in lines)
    (storage / "pretrained").mkdir(exist_ok=True)
    os.link(folder / BASE, partial(storage, BASE))  # what a call leaves that is killed after linking
    fetch()
    assert {path: contents for path, contents in tree(folder).items() if contents and path in files} == files
    assert tree(storage) == expected(site.files, "flickr")


# ---- room on the disk


def test_too_little_room(site: Site, storage: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = sum(len(site.files[path]) for path in CHOICES["flickr"] if path.endswith(".tar"))
    needed = 2 * archives + 60_000
    free = [needed - 1]
    monkeypatch.setattr(download_itm.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free[0]))
    (line,) = fetch(code=2)
    assert (
        f"error: {storage}: {needed / 1000:.3g} kB are needed for archives and what they hold, {needed / 1000:.3g} kB are"
        in line
    )
    assert not storage.exists()
    assert not any(method == "GET" for method, _, _ in site.requests)
    free[0] = needed
    site.faults[BASE].extend([Fault(sent=12_000), Fault(404)])
    fetch(code=2)
    free[0] = 17_999  # the rest of one file
    fetch(code=2)
    free[0] += 1
    fetch()
    shutil.rmtree(storage / "img_db/flickr30k")
    free[0] = len(site.files[IMAGES]) - 1
    fetch(code=2)
    free[0] += 1
    fetch()
    assert tree(storage) == expected(site.files, "flickr")


def test_a_disk_that_is_full_in_the_middle(site: Site, storage: Path) -> None:
    """A limit on the size of files stands in for it."""
    site.files[BASE] = noise(100_000)
    command = 'ulimit -f 64; exec bash "$@"'
    words = ["bash", "-c", command, "bash", str(SCRIPT), str(storage), "flickr", "--mirror", site.url]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {storage / BASE}: File too large; mend that and call again, what was got is kept\n"
    assert partial(storage, BASE).stat().st_size == 64 << 10
    finish(start(storage, "flickr", "--mirror", site.url))
    assert site.got(BASE) == [None, f"bytes={64 << 10}-"]
    assert tree(storage) == expected(site.files, "flickr")


# ---- ends before the end


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_downloading(site: Site, storage: Path, number: int, code: int) -> None:
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    process = start(storage, "flickr", "--mirror", site.url)
    path = partial(storage, IMAGES)
    wait_for(lambda: path.exists() and path.stat().st_size == 8000)
    process.send_signal(number)
    _, errors = finish(process, code)
    assert errors == ("" if code < 0 else f"interrupted by {signal.Signals(number).name}\n")
    assert path.stat().st_size == 8000
    assert (storage / ".download.lock").exists() == (code < 0)
    finish(start(storage, "flickr", "--mirror", site.url))
    assert site.got(IMAGES) == [None, "bytes=8000-"]
    assert tree(storage) == expected(site.files, "flickr")


KILLING = """
import os, time
module, name, number = os.environ["MOMENT"].split()
module = __import__(module)
function, calls = getattr(module, name), []
def counted(*arguments, **more):
    calls.append(0)
    if len(calls) == int(number):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        time.sleep(0.2)
    return function(*arguments, **more)
setattr(module, name, counted)
"""


# With one job a mirror's two checkpoints come first, being the largest, each with a replace and two fsync; then an archive.
@pytest.mark.parametrize(
    ("source", "moment", "left", "not_left"),
    [
        ("--mirror", "os replace 1", ".uniter-base.pt.partial.json", "uniter-base.pt"),
        ("--mirror", "os replace 3", ".flickr30k.tar.partial.json", "flickr30k.tar"),
        ("--mirror", "os fsync 6", "flickr30k.tar", ".flickr30k.partial"),
        ("--mirror", "os fsync 7", ".flickr30k.partial/data.mdb", ".flickr30k.partial/empty"),
        ("--mirror", "os rename 1", ".flickr30k.partial/empty", "flickr30k"),
        ("--from", "os link 1", "img_db", ".flickr30k.tar.partial"),
        ("--from", "os replace 1", ".flickr30k.tar.partial", "flickr30k.tar"),
        ("--from", "os rename 1", ".flickr30k.partial/empty", "flickr30k"),
    ],
)
def test_killed_at(site: Site, storage: Path, tmp_path: Path, source: str, moment: str, left: str, not_left: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLING)
    folder = lay_out(tmp_path / "here", site.files, False)
    options = (storage, "flickr", source, site.url if source == "--mirror" else folder)
    finish(start(*options, "--jobs", 1, PYTHONPATH=str(tmp_path), MOMENT=moment, SIGNAL="9"), -9)
    half_done = tree(storage)
    names = {part for path in half_done for part in (path, path.split("/", 1)[-1])}
    assert left in names
    assert not_left not in names
    whole = {path for path in CHOICES["flickr"] if path in half_done}
    site.requests.clear()
    main([str(option) for option in options])
    assert tree(storage) == expected(site.files, "flickr")
    assert tree(folder) == tree(lay_out(tmp_path / "anew", site.files, False))
    begun = {path for path in CHOICES["flickr"] if str(partial(Path(), path)) in half_done}
    asked = {name for method, name, _ in site.requests if method == "GET"} - {"SHA256SUMS"}
    assert asked == (set(CHOICES["flickr"]) - whole - begun if source == "--mirror" else set())


def test_terminated_while_unpacking(site: Site, storage: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLING)
    options = (storage, "flickr", "--mirror", site.url, "--jobs", 1)
    finish(start(*options, PYTHONPATH=str(tmp_path), MOMENT="os fsync 7", SIGNAL="15"), 143)
    assert os.listdir(storage / "img_db") == ["flickr30k.tar"]  # neither a folder nor what was to become one
    main([str(option) for option in options])
    assert tree(storage) == expected(site.files, "flickr")
    assert len(site.got(IMAGES)) == 1


def test_two_calls_at_once(site: Site, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (IMAGES, BASE):
        site.faults[path].append(Fault(sent=8000, stalls=True))
    first = start(storage, "flickr", "--mirror", site.url, "--jobs", 2)
    wait_for(lambda: partial(storage, IMAGES).exists() and partial(storage, BASE).exists())
    with pytest.raises(SystemExit) as stop:
        main([str(storage), "coco", "--mirror", site.url])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {storage}: another download into it is at work; let it end, or end it\n"
    site.released.set()
    finish(first)
    assert tree(storage) == expected(site.files, "flickr")


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: STORAGE"),
        (["s", "flickr30k"], "invalid choice: 'flickr30k'"),
        (["s", "--mirror", "ftp://host/x"], "'ftp://host/x' is not an address that begins with http:// or https://"),
        (["s", "--mirror", "http://host/a b"], "is not an address"),
        (["s", "--mirror", "http:///x"], "is not an address"),
        (["s", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["s", "--jobs", "many"], "--jobs: invalid int value: 'many'"),
        (["s", "--mirr", "http://host"], "unrecognized arguments: --mirr"),
    ],
)
def test_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_storage_that_is_none(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_text("a file")
    with pytest.raises(SystemExit) as stop:
        main([str(storage)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {storage}: File exists; mend that and call again, what was got is kept\n"


def test_a_terminal_has_a_status_line(site: Site, storage: Path) -> None:
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    screen, terminal = pty.openpty()
    words = ["bash", str(SCRIPT), str(storage), "flickr", "--mirror", site.url]
    process = subprocess.Popen(words, stderr=terminal, stdout=subprocess.PIPE, text=True)
    os.close(terminal)
    seen = b""
    while not re.search(rb"\r\x1b\[K[\d.]+ kB of [\d.]+ kB fetched and unpacked, [\d.]+ k?B/s", seen):
        seen += os.read(screen, 1000)
    site.released.set()
    process.communicate(timeout=10)
    os.close(screen)
    assert process.returncode == 0
    assert tree(storage) == expected(site.files, "flickr")


def test_it_needs_nothing_that_is_installed(tmp_path: Path) -> None:
    code = """
import sys
sys.path[0] = sys.argv[1]
import scripts.download_itm
installed = [name for name, module in sys.modules.items() if "site-packages" in (getattr(module, "__file__", "") or "")]
sys.exit(f"imports {installed}" if installed else 0)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code, ROOT], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_interpreter(tmp_path: Path) -> None:
    def run(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": str(tools)} | environment
        words = [shutil.which("bash") or "", str(root / "scripts/python.sh"), "-c", "import sys; print(sys.argv)", "a b"]
        return subprocess.run(words, env=kept, capture_output=True, text=True, check=False)

    def interpreter(path: Path, version: int) -> None:
        """One that says its path, and is of 3.``version``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        check = f'[ "$2" != "import sys; sys.exit(sys.version_info < (3, 10))" ] || exit {int(version < 10)}'
        path.write_text(f'#!/bin/sh\n{check}\necho "$0" "$3"\n')
        path.chmod(0o755)

    tools, copy = tmp_path / "tools", tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/python.sh", copy / "scripts")
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")
    done = run(copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: no Python 3\.10 or newer \(tried .*python3\); install one or set PYTHON=<path of one>\n", done.stderr
    )
    interpreter(tools / "python3", 9)
    assert run(copy).returncode == 2
    interpreter(tools / "python3.11", 11)
    interpreter(tools / "python3.10", 10)
    assert run(copy).stdout == f"{tools}/python3.11 a b\n"
    interpreter(copy / ".venv/bin/python", 10)
    assert run(copy).stdout == f"{copy}/scripts/../.venv/bin/python a b\n"
    assert run(copy, PYTHON=sys.executable).stdout == "['-c', 'a b']\n"
    done = run(copy, PYTHON=str(tools / "python3"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)

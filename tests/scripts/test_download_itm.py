"""scripts/download_itm.sh: downloads from a web server that misbehaves, hostile archives, wrong input and interruptions."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest

from data.sources import download
from data.sources.download import DATASETS
from scripts.download_itm import main
from tests.conftest import BUNDLED
from tests.processes import ROOT

BASE, LARGE = "pretrained/uniter-base.pt", "pretrained/uniter-large.pt"
IMAGES, TEST, VAL = "img_db/flickr30k.tar", "txt_db/itm_flickr30k_test.db.tar", "txt_db/itm_flickr30k_val.db.tar"
SUMS = "SHA256SUMS"
ADVICE = "; name a copy with --mirror URL, or a folder that has the file with --from DIR\n"


class Fault(NamedTuple):
    """What the server does wrong in response to one request."""

    status: int = 0
    sent: int | None = None  # bytes after which it closes the connection
    stalls: bool = False  # instead of closing it
    headers: dict[str, str | None] = {}  # noqa: RUF012  (None: absent)


CUT, LATER, STALL = Fault(sent=10_000), "bytes=10000-", Fault(sent=8000, stalls=True)


class Site(ThreadingHTTPServer):
    """Serves ``files`` below /uniter; each GET uses up one of the ``faults`` of its path. A temporary folder, and a client."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.storage, self.capsys = folder, folder / "the storage", capsys
        self.mirror = ("flickr", "--mirror", f"http://127.0.0.1:{self.server_port}/uniter")
        self.files = {path: random.Random(path).randbytes(30_000) for path in DATASETS["all"]}
        for path in self.files:
            if path.endswith(".tar"):
                self.files[path] = archive(BUNDLED.image_db if path.startswith("img") else BUNDLED.text_db, Path(path).stem)
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.headers: dict[str, str | None] = {}  # of all responses
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.released = threading.Event()  # ends stalls

    def ranges(self, path: str) -> list[str | None]:
        return [asked for method, name, asked in self.requests if (method, name) == ("GET", path)]

    def fetch(self, *words: object, code: int = 0) -> str:
        """Download, by default flickr from this site; return the output or the errors. A success leaves the whole tree."""
        self.requests.clear()
        words, ended = words or self.mirror, 0
        try:
            main([str(self.storage), *map(str, words)])
        except SystemExit as error:
            ended = error.code
        output, errors = self.capsys.readouterr()
        assert (ended, bool(errors)) == (code, bool(code)), errors
        assert code or tree(self.storage) == self.tree(next((word for word in words if word in DATASETS), "all"))
        return errors or output

    def tree(self, dataset: str) -> dict[str, bytes | None]:
        folder = lay_out(Path(mkdtemp(dir=self.folder)), {path: self.files[path] for path in DATASETS[dataset]})
        (folder / "finetune").mkdir()
        for path in folder.rglob("*.tar"):
            shutil.unpack_archive(path, path.parent, filter="data")
        return tree(folder)

    def handle_error(self, *_: object) -> None:
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, asked = self.path.split("/uniter/", 1)[-1], self.headers["Range"]  # a proxy is asked for the whole URL
        self.server.requests.append((self.command, path, asked))
        faults = self.server.faults[path] if self.command == "GET" else None
        fault = faults.pop(0) if faults else Fault()
        body = self.server.files.get(path, b"")
        status = fault.status or (200 if body else 404)
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} | self.server.headers
        if status != 200:
            body = b""
        elif asked and not fault.status and self.headers["If-Range"] in (headers["ETag"], headers.get("Last-Modified")):
            status, body = 206, body[int(asked.removeprefix("bytes=").removesuffix("-")) :]
            headers["Content-Range"] = asked.replace("=", " ") + "999999/1000000"
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers | fault.headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: fault.sent])
            self.server.released.wait(20 * fault.stalls)

    do_HEAD = do_GET


def archive(folder: Path, top: str, *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, top)
        for member in others:
            tar.addfile(member)
    return buffer.getvalue()


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for path, contents in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    return folder


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(contents).hexdigest()}  {path}\n" for path, contents in files.items()).encode()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return {path: contents, None for a folder} of all that is in a folder, hidden or not."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "STALL", "1")
    with Site(tmp_path, capsys) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def test_the_published_tree(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.mirror[-1].removesuffix("/uniter"))
    site.fetch("--mirror", "http://mirror.invalid/uniter/", "coco", "--jobs", 1)
    assert {path for _, path, _ in site.requests} == {*DATASETS["coco"], SUMS}
    site.files[SUMS] = sums(site.files)
    lines = site.fetch(*site.mirror[1:]).splitlines()
    assert set(lines) == {
        f"{site.storage / path}: fetched and unpacked" for path in DATASETS["flickr"] if path.endswith(".tar")
    }
    before = {path: path.stat().st_mtime_ns for path in (site.storage, *site.storage.rglob("*"))}
    assert site.fetch("all", "--from", "/", "--jobs", 2) == f"{site.storage}: complete\n"
    assert site.fetch(*site.mirror[1:], "all") == f"{site.storage}: complete\n"
    assert site.requests == []
    assert before == {path: path.stat().st_mtime_ns for path in (site.storage, *site.storage.rglob("*"))}


@pytest.mark.parametrize(
    ("faults", "always", "ranges"),
    [
        ([CUT, *[Fault(sent=500)] * 9], {}, [None, *(f"bytes={n}-" for n in range(10_000, 14_501, 500))]),
        ([Fault(503), CUT, *map(Fault, (503, 429, 500, 504))], {}, [None, None, *[LATER] * 5]),
        ([Fault(302, headers={"Location": f"/uniter/{BASE}"}), CUT], {}, [None, None, LATER]),
        *(([CUT, Fault(status)], {}, [None, LATER, None]) for status in (200, 206, 416)),
        ([CUT], {"ETag": None, "Last-Modified": "Sun, 01 Sep 2019 12:00:00 GMT"}, [None, LATER]),
        ([CUT], {"ETag": 'W/"1"'}, [None, None]),
        ([Fault(sent=10_000, headers={"Content-Length": "10000"})], {}, [None, None]),
        ([STALL], {}, [None, "bytes=8000-"]),
    ],
)
def test_a_broken_download_is_resumed(site: Site, faults: list[Fault], always: dict[str, str], ranges: list[str]) -> None:
    site.headers, site.faults[BASE] = always, faults.copy()
    site.fetch()
    assert site.ranges(BASE) == ranges


def test_what_was_received_is_kept_unless_the_file_changed(site: Site) -> None:
    site.faults[BASE] = [Fault(sent=12_000), *[Fault(sent=0)] * 5]
    errors = site.fetch(code=2)
    assert f"18000 bytes remaining to read{ADVICE.strip()}, or rerun to resume (6 tries in a row failed)\n" in errors
    (file,) = site.storage.glob("pretrained/.*")
    file.write_bytes(site.files[BASE])
    site.fetch()
    assert site.ranges(BASE) == []
    (site.storage / BASE).unlink()
    site.faults[BASE] = [CUT, Fault(404)]
    assert f"/{BASE}: The requested URL returned error: 404{ADVICE}" in site.fetch(code=2)
    site.files[BASE] = site.files[LARGE]
    site.fetch()
    assert site.ranges(BASE) == [None]


def test_only_what_is_missing_or_wrong_is_requested(site: Site) -> None:
    right = site.files.copy()
    some = {IMAGES: right[IMAGES][:3000], VAL: right[VAL], SUMS: sums({Path(VAL).name: b"not this"})}
    folder = lay_out(site.folder / "here", some)
    errors = site.fetch("flickr", "--from", folder, code=2)
    assert all(f"--from {folder}: has no {path}; add it, or name a --mirror URL too" in errors for path in (BASE, LARGE, TEST))
    assert f"{folder / VAL}: its SHA-256" in errors
    assert f"{site.storage / IMAGES}: damaged or unsafe archive" in errors
    assert not any(path.is_file() for path in site.storage.rglob("*"))
    assert {path: contents for path, contents in tree(folder).items() if contents} == some

    lay_out(folder, {IMAGES: right[IMAGES], SUMS: b""})
    site.files |= {BASE: right[LARGE], SUMS: sums({f"./{path}": right[path] for path in right if path != LARGE})}
    del site.files[LARGE], site.files[TEST]
    errors = site.fetch(*site.mirror, "--from", folder, code=2)
    digests = [hashlib.sha256(right[path]).hexdigest() for path in (LARGE, BASE)]
    assert "/{}: its SHA-256 is {}, but SHA256SUMS says {}; rerun".format(BASE, *digests) in errors
    assert all(f"{site.mirror[-1]}/{path}: The requested URL returned error: 404{ADVICE}" in errors for path in (LARGE, TEST))
    assert errors.endswith(f"error: {site.storage}: 3 of 6 files are missing\n")
    assert set(DATASETS["flickr"]) - tree(site.storage).keys() == {BASE, LARGE, TEST}

    site.files |= right
    shutil.rmtree(site.storage / "img_db/flickr30k")
    (site.storage / TEST).with_suffix("").mkdir()
    lay_out(site.storage, {"img_db/.flickr30k.partial/x": b"killed", "img_db/.flickr30k.tar.1.partial": b"stopped"})
    site.fetch()
    assert {path for _, path, _ in site.requests} == {BASE, LARGE, TEST, SUMS}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_from_a_folder(site: Site, monkeypatch: pytest.MonkeyPatch, flat: bool, links: bool) -> None:
    files = {Path(path).name if flat else path: contents for path, contents in site.files.items()}
    folder = lay_out(site.folder / "here", files | {SUMS: sums(files)})
    file = folder / (Path(BASE).name if flat else BASE)
    if flat:
        file.rename(site.folder / "original")
        file.symlink_to("../original")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere"))
    site.fetch("flickr", "--from", folder)
    assert file.samefile(site.storage / BASE) == links
    assert not (site.storage / BASE).is_symlink()
    assert site.requests == []


@pytest.mark.parametrize(
    ("words", "headers", "message"),
    [
        ((), {"Content-Length": None}, "length unknown; expected a file; name a copy"),
        ((), {"Content-Length": "0"}, "length 0; expected"),
        ((), {"Content-Type": "text/html; charset=utf-8"}, f"/{BASE}: the server sends type text/html, "),
        ((), {"Content-Length": f"{10**17}"}, "the storage: archives and what they hold need 1,000,000,000.0 GB"),
        ((), {}, "/SHA256SUMS: not a list of SHA-256 and paths"),
        (("--mirror", "http://127.0.0.1:9"), {}, f"http://127.0.0.1:9/{BASE}: Failed to connect to 127.0.0.1 port 9"),
        (("--mirror", "ftp://host/x"), {}, "'ftp://host/x': expected an address that begins with http:// or https://"),
        (("--mirror", "http://host/a b"), {}, "expected an address"),
        (("--mirror", "http:///x"), {}, "expected an address"),
        (("--from", "/nowhere"), {}, "--from /nowhere: no such folder"),
        (("--jobs", "0"), {}, "--jobs 0: expected at least 1"),
        (("--mirr", "http://host"), {}, "unrecognized arguments: --mirr"),
    ],
)
def test_wrong_input(site: Site, words: tuple[str, ...], headers: dict[str, str | None], message: str) -> None:
    site.headers, site.files[SUMS] = headers, b"<html>"
    assert message in site.fetch(*words, code=2)
    assert not site.storage.exists()
    assert {path for method, path, _ in site.requests if method == "GET"} <= {SUMS}


def test_what_a_machine_lacks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(site.storage, {"txt_db": b"a file of the user"})
    assert site.fetch(code=2) == f"error: {site.storage}/txt_db: File exists; fix this and rerun, downloads are kept\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert site.fetch(code=2) == "error: curl: no such program; install the package curl\n"
    monkeypatch.delattr(tarfile, "data_filter")
    assert "this Python cannot unpack archives safely; install 3.10.12, 3.11.4 or newer" in site.fetch(code=2)


@pytest.mark.parametrize(
    ("name", "kind", "target", "message"),
    [
        ("../evil", tarfile.REGTYPE, "", "member '../evil' is not a file or folder below itm_flickr30k_test.db/"),
        ("itm_flickr30k_test.db/../../../evil", tarfile.REGTYPE, "", "would be extracted to"),
        ("/tmp/evil", tarfile.REGTYPE, "", "'/tmp/evil' is not"),
        ("itm_flickr30k_test.db_/x", tarfile.REGTYPE, "", "_/x' is not"),
        ("itm_flickr30k_test.db/x", tarfile.SYMTYPE, "/etc", "/x' is not"),
        ("itm_flickr30k_test.db/x", tarfile.LNKTYPE, "itm_flickr30k_test.db/meta.json", "/x' is not"),
        ("itm_flickr30k_test.db/x", tarfile.CHRTYPE, "", "/x' is not"),
        ("itm_flickr30k_test.db/x", tarfile.FIFOTYPE, "", "/x' is not"),
    ],
)
def test_hostile_archives(site: Site, name: str, kind: bytes, target: str, message: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    right, site.files[TEST] = site.files[TEST], archive(BUNDLED.text_db, "itm_flickr30k_test.db", member)
    errors = site.fetch(code=2)
    assert re.search(f"{TEST}: damaged or unsafe archive: .*{message}.*; it was removed, rerun or name a copy", errors)
    assert "test.db" not in " ".join(tree(site.storage))
    assert not (site.folder / "evil").exists()
    assert not Path("/tmp/evil").exists()
    lay_out(site.storage, {TEST: site.files[TEST]})
    assert "; remove it to have it downloaded" in site.fetch(code=2)
    (site.storage / TEST).unlink()
    site.files[TEST] = right
    site.fetch()


def test_an_archive_truncated_anywhere(tmp_path: Path) -> None:
    source = lay_out(tmp_path / "source", dict.fromkeys(("a", "last", "x" * 90 + "/" + "y" * 150), b"x" * 700))
    whole = archive(source, "./top")
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512 + 1024  # without padding
    for cut in (block + more for block in range(0, end, 512) for more in (0, 1, 300)):
        file = lay_out(tmp_path / "in", {"top.tar": whole[:cut]}) / "top.tar"
        with pytest.raises(tarfile.TarError):
            download.unpack(file, file.with_suffix(""))
        assert list(file.parent.iterdir()) == [file]
    file.write_bytes(whole[:end])
    download.unpack(file, file.with_suffix(""))
    assert tree(file.with_suffix("")) == tree(source)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_downloading(site: Site, number: int, code: int) -> None:
    """One call at a time; after SIGKILL curl continues, and excludes others until it ends."""
    site.faults[IMAGES] = [STALL]
    command = ["bash", str(ROOT / "scripts/download_itm.sh"), str(site.storage), *site.mirror]
    allow = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # nohup and the like ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=allow)
    deadline = time.monotonic() + 20
    while [file.stat().st_size for file in site.storage.glob("img_db/.*")] != [8000]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    busy = f"error: {site.storage}: another download, or a curl that it left, is running; wait for it or stop it\n"
    assert site.fetch(code=2) == busy
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (code, f"interrupted by {signal.Signals(number).name}\n" * (code > 0))
    if code < 0:
        assert site.fetch(code=2) == busy
        site.released.set()
        time.sleep(0.5)
    site.fetch()
    assert site.ranges(IMAGES) == ["bytes=8000-"]


def test_ended_while_unpacking(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert site.fetch(code=143) == "interrupted by SIGTERM\n"
    assert not any(path.is_dir() for path in site.storage.glob("*_db/*"))
    site.fetch()


def test_a_status_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main([str(site.storage), *site.mirror])
    assert re.search(r"^[1-9][\d.]*% of 0\.0 GB\x1b\[K\r", site.capsys.readouterr().err)


def test_nothing_has_to_be_installed_nor_to_read_the_output(site: Site) -> None:
    code = "import sys; sys.path[0] = sys.argv.pop(1); from scripts.download_itm import main; main()"
    command = [sys.executable, "-S", "-c", code, ROOT, site.storage, *site.mirror]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE

"""scripts/download_itm.sh as users start it: what it leaves, what it refuses, and that it can be interrupted at any moment."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.image_db import ImageDatabase
from data.sources.download import DATASETS
from data.text_db import TextDatabase
from tests.conftest import BUNDLED
from tests.launch import ROOT
from tests.web import Fault, Site

SCRIPT = ROOT / "scripts/download_itm.sh"
BASE, LARGE = "pretrained/uniter-base.pt", "pretrained/uniter-large.pt"
IMAGES, TEST, VAL = "img_db/flickr30k.tar", "txt_db/itm_flickr30k_test.db.tar", "txt_db/itm_flickr30k_val.db.tar"
SUMS = "SHA256SUMS"
FLICKR = DATASETS["flickr"]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for path, contents in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    return folder


def archive_of(folder: Path, top: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, top)
    return buffer.getvalue()


def published(folder: Path) -> dict[str, bytes]:
    """Return small stand-ins for all published files, made in ``folder``."""
    files = {path: noise(30_000, number) for number, path in enumerate(DATASETS["all"])}
    for path in files:
        if path.endswith(".tar"):
            members = {"data.mdb": files[path][:9000], "deep/nbb.json": b"{}", "empty": b""}
            files[path] = archive_of(lay_out(folder / path, members), Path(path).stem)
    return files


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(contents).hexdigest()}  {path}\n" for path, contents in files.items()).encode()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return {path: contents, None for a folder} of all that is in a folder, hidden or not."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def expected(files: dict[str, bytes], dataset: str = "flickr") -> dict[str, bytes | None]:
    """Return the tree that a download of ``files`` leaves."""
    with tempfile.TemporaryDirectory() as name:
        folder = lay_out(Path(name), {path: files[path] for path in DATASETS[dataset]})
        (folder / "finetune").mkdir()
        for path in folder.rglob("*.tar"):
            with tarfile.open(path) as tar:
                tar.extractall(path.parent, filter="data")
        return tree(folder)


def partial(storage: Path, path: str) -> Path:
    return (storage / path).with_name(f".{Path(path).name}.partial")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PYTHON", sys.executable)
    with Site() as server:
        server.files = published(tmp_path / "published")
        yield server


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "the storage"


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start the program. Ctrl-C reaches it even if these tests run where it is ignored, as under nohup."""
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[list[str], list[str]]:
    """Return the sorted lines of output and errors."""
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    return sorted(output.splitlines()), sorted(errors.splitlines())


Fetch = Callable[..., list[str]]


@pytest.fixture
def fetch(site: Site, storage: Path) -> Fetch:
    """Download flickr with these options, by default from the site; return the errors. A success leaves the whole tree."""

    def call(*options: object, code: int = 0, **environment: str) -> list[str]:
        _, errors = finish(start(storage, "flickr", *(options or ("--mirror", site.url)), **environment), code)
        assert all(line.startswith("error: ") for line in errors)
        assert bool(errors) == bool(code)
        assert not (storage / ".download.lock").exists()
        assert code or tree(storage) == expected(site.files)
        return errors

    return call


def test_the_published_tree(site: Site, storage: Path) -> None:
    site.files[IMAGES] = archive_of(BUNDLED.image_db, "flickr30k")
    site.files[TEST] = archive_of(BUNDLED.text_db, "itm_flickr30k_test.db")
    site.files[SUMS] = sums(site.files)
    site.faults[IMAGES].append(Fault(sent=70_000))
    site.faults[TEST].append(Fault(500))
    lines = [f"{storage / path}: fetched{' and unpacked' * path.endswith('.tar')}" for path in DATASETS["all"]]
    assert finish(start(storage, "--mirror", site.url)) == (sorted(lines), [])
    assert tree(storage) == expected(site.files, "all")
    assert site.ranges(IMAGES) == [None, "bytes=70000-"]
    assert list(TextDatabase(storage / "txt_db/itm_flickr30k_test.db").ids) == list(TextDatabase(BUNDLED.text_db).ids)
    assert list(ImageDatabase(storage / "img_db/flickr30k").names()) == list(ImageDatabase(BUNDLED.image_db).names())

    site.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}
    assert finish(start(storage, "all", "--mirror", site.url, "--jobs", 2)) == ([f"{storage}: complete"], [])
    assert finish(start(storage, "--from", "/", "coco")) == ([f"{storage}: complete"], [])
    assert site.requests == []
    assert before == {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}


def test_one_dataset_through_a_proxy(site: Site, storage: Path) -> None:
    proxy = site.url.removesuffix("/uniter")
    finish(start(storage, "--mirror", "http://mirror.invalid/uniter/", "coco", "--jobs", 1, http_proxy=proxy))
    assert tree(storage) == expected(site.files, "coco")
    assert site.requested() == {*DATASETS["coco"], SUMS}


def test_only_what_is_missing_is_requested(site: Site, storage: Path, fetch: Fetch) -> None:
    missing = {path: site.files.pop(path) for path in (LARGE, TEST)}
    lines = [f"error: {site.url}/{path}: the server answers 404 Not Found" for path in missing]
    assert [line.split(";")[0] for line in fetch(code=2)] == lines
    assert set(FLICKR) & tree(storage).keys() == set(FLICKR) - set(missing)
    site.files |= missing
    site.requests.clear()
    fetch()
    assert site.requested() == {*missing, SUMS}

    for folder in storage.glob("txt_db/*.db"):
        shutil.rmtree(folder)
        folder.mkdir()
    for path in (IMAGES, BASE):
        partial(storage, path).write_bytes(b"left by a call after which the user supplied the rest")
    fetch()
    (storage / IMAGES).unlink()  # an archive that was unpacked is not needed
    assert finish(start(storage, "flickr")) == ([f"{storage}: complete"], [])
    assert site.requested() == set()


@pytest.mark.parametrize(("status", "message"), [(409, "the server answers 409 Conflict"), (0, "Connection refused, 3 tries")])
def test_a_host_that_delivers_nothing(site: Site, storage: Path, fetch: Fetch, status: int, message: str) -> None:
    site.always = Fault(status)
    url = site.url if status else "http://127.0.0.1:9/uniter"
    for line, path in zip(fetch("--mirror", url, "--jobs", 9, code=2), sorted(FLICKR), strict=True):
        assert line.startswith(f"error: {url}/{path}: {message}")
        assert line.endswith("; name a copy with --mirror URL, or a folder that has the file with --from DIR")
    assert not storage.exists()


def test_checksums(site: Site, storage: Path, fetch: Fetch) -> None:
    site.files[SUMS] = b"<html>"
    (line,) = fetch(code=2)
    assert f"{site.url}/{SUMS}: line 1 is not a SHA-256 and a path" in line
    assert not storage.exists()
    site.files[SUMS] = sums({f"./{path}": contents for path, contents in site.files.items() if path not in (LARGE, SUMS)})
    right, site.files[BASE] = site.files[BASE], noise(30_000, 99)
    (line,) = fetch(code=2)
    digests = [hashlib.sha256(contents).hexdigest() for contents in (site.files[BASE], right)]
    assert "{}/{}: its SHA-256 is {}, but SHA256SUMS says {}; what was".format(site.url, BASE, *digests) in line
    assert set(tree(storage / "pretrained")) == {"uniter-large.pt"}
    site.files[BASE] = right
    fetch()


def test_a_damaged_archive_is_removed_unless_the_user_put_it_there(site: Site, storage: Path, fetch: Fetch) -> None:
    right, site.files[TEST] = site.files[TEST], site.files[VAL]
    (line,) = fetch(code=2)
    assert f"{storage / TEST}: member 'itm_flickr30k_val.db' is not below itm_flickr30k_test.db/; it was removed" in line
    assert "itm_flickr30k_test.db" not in " ".join(tree(storage))
    (storage / TEST).write_bytes(right[:-10_000])
    (line,) = fetch(code=2)
    assert "remove it to have it downloaded" in line
    (storage / TEST).unlink()
    site.files[TEST] = right
    fetch()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_from_a_folder(site: Site, storage: Path, fetch: Fetch, tmp_path: Path, flat: bool, links: bool) -> None:
    files = {Path(path).name if flat else path: contents for path, contents in site.files.items()}
    folder = lay_out(tmp_path / "elsewhere", files | {SUMS: sums(files)})
    if flat:
        (tmp_path / "here").mkdir()
        for path in folder.iterdir():
            (tmp_path / "here" / path.name).symlink_to(f"../elsewhere/{path.name}")
    if not links:
        (tmp_path / "sitecustomize.py").write_text("import os\ndef link(*_): raise OSError\nos.link = link")
    fetch("--from", tmp_path / "here" if flat else folder, PYTHONPATH=str(tmp_path))
    assert (folder / (Path(BASE).name if flat else BASE)).samefile(storage / BASE) == links
    assert not (storage / BASE).is_symlink()
    assert site.requests == []


def test_a_folder_that_lacks_files_or_has_wrong_ones(site: Site, storage: Path, fetch: Fetch, tmp_path: Path) -> None:
    some = {path: contents for path, contents in site.files.items() if path not in (LARGE, TEST)}
    listed = sums({VAL: b"not this", Path(BASE).name: b"nor that"})
    folder = lay_out(tmp_path / "here", some | {IMAGES: some[IMAGES][:3000], SUMS: listed})
    before = tree(folder)
    lines = fetch("--from", folder, code=2)
    assert lines[:2] == [f"error: --from {folder}: has no {path}; add it, or name a --mirror URL too" for path in (LARGE, TEST)]
    assert [line.split(" is ")[0] for line in lines[2:4]] == [f"error: {folder / path}: its SHA-256" for path in (BASE, VAL)]
    assert lines[4].startswith(f"error: {storage / IMAGES}: damaged, or not a tar archive")
    assert not {TEST, LARGE, BASE, VAL, IMAGES, "finetune"} & tree(storage).keys()
    assert tree(folder) == before
    assert fetch("--from", tmp_path / "nowhere", code=2) == [f"error: --from {tmp_path / 'nowhere'}: no such folder"]
    for path in (IMAGES, BASE, VAL):
        (folder / path).unlink()
    fetch("--from", folder, "--mirror", site.url)
    assert site.requested() == {TEST, LARGE, IMAGES, BASE, VAL, SUMS}


def test_too_little_space(site: Site, storage: Path, fetch: Fetch) -> None:
    site.always = Fault(headers={"Content-Length": f"{10**17}"})
    (line,) = fetch(code=2)
    assert line.startswith(f"error: {storage}: archives and what they hold need 1,000,000,000.0 GB, but only ")
    assert not storage.exists()
    assert not any(method == "GET" for method, _, _ in site.requests)


def test_a_disk_that_becomes_full(site: Site, storage: Path, fetch: Fetch) -> None:
    """A limit on the size of files stands in for it."""
    site.files[BASE] = noise(100_000)
    words = ["bash", "-c", 'ulimit -f 64; exec bash "$@"', "bash", SCRIPT, storage, "flickr", "--mirror", site.url]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {storage / BASE}: File too large; fix this and rerun, partial downloads are kept\n"
    assert partial(storage, BASE).stat().st_size == 64 << 10
    fetch()
    assert site.ranges(BASE) == [None, f"bytes={64 << 10}-"]


def wait_for(path: Path, size: int) -> None:
    deadline = time.monotonic() + 10
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_downloading(site: Site, storage: Path, fetch: Fetch, number: int, code: int) -> None:
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    process = start(storage, "flickr", "--mirror", site.url)
    path = partial(storage, IMAGES)
    wait_for(path, 8000)
    process.send_signal(number)
    _, errors = finish(process, code)
    assert errors == ([] if code < 0 else [f"interrupted by {signal.Signals(number).name}"])
    assert path.stat().st_size == 8000
    assert (storage / ".download.lock").exists() == (code < 0)
    fetch()
    assert site.ranges(IMAGES) == [None, "bytes=8000-"]


KILLING = """
import json, os, sys, time
part, moment, number = json.loads(os.environ["KILL_AT"])
seen = []
def hook(event, arguments):
    if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove") and part in str(arguments):
        seen.append(event)
        if len(seen) == moment:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
sys.addaudithook(hook)
"""


def end_at(folder: Path, part: str, moment: int, number: int, *options: object) -> None:
    """Start a download that a signal ends before the ``moment``-th change to a path that contains ``part``."""
    (folder / "sitecustomize.py").write_text(KILLING)
    process = start(*options, "--jobs", 1, PYTHONPATH=str(folder), KILL_AT=json.dumps([part, moment, number]))
    finish(process, -9 if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize("source", ["--mirror", "--from"])
@pytest.mark.parametrize("moment", range(1, 19))
def test_killed_at(site: Site, storage: Path, fetch: Fetch, tmp_path: Path, source: str, moment: int) -> None:
    folder = lay_out(tmp_path / "here", site.files)
    options = (source, site.url if source == "--mirror" else folder)
    end_at(tmp_path, f"{storage}/img_db", moment, signal.SIGKILL, storage, "flickr", *options)
    whole = {path for path in FLICKR if (storage / path).is_file()}
    site.requests.clear()
    fetch(*options)
    assert tree(folder).items() >= site.files.items()
    assert site.requested() - {SUMS} == (set(FLICKR) - whole if source == "--mirror" else set())


def test_terminated_while_unpacking(site: Site, storage: Path, fetch: Fetch, tmp_path: Path) -> None:
    end_at(tmp_path, ".flickr30k.partial/data.mdb", 1, signal.SIGTERM, storage, "flickr", "--mirror", site.url)
    assert os.listdir(storage / "img_db") == ["flickr30k.tar"]
    fetch()
    assert len(site.ranges(IMAGES)) == 1


def test_two_calls_at_once_and_a_status_line(site: Site, storage: Path) -> None:
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    screen, terminal = pty.openpty()
    words = ["bash", SCRIPT, storage, "flickr", "--mirror", site.url, "--jobs", "2"]
    first = subprocess.Popen(words, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    wait_for(partial(storage, IMAGES), 8000)
    _, errors = finish(start(storage, "coco", "--mirror", site.url), 2)
    assert errors == [f"error: {storage}: another download into this folder is running; wait for it or stop it"]
    seen = b""
    while not re.search(rb"\r\x1b\[K0\.0 of 0\.0 GB fetched and unpacked, [\d.]+ MB/s", seen):
        seen += os.read(screen, 1000)
    site.released.set()
    assert first.wait(10) == 0
    os.close(screen)
    assert tree(storage) == expected(site.files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: STORAGE"),
        (["s", "flickr30k"], "invalid choice: 'flickr30k'"),
        (["s", "--mirror", "ftp://host/x"], "'ftp://host/x' is not an address that begins with http:// or https://"),
        (["s", "--mirror", "http://host/a b"], "is not an address"),
        (["s", "--mirror", "http:///x"], "is not an address"),
        (["s", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["s", "--mirr", "http://host"], "unrecognized arguments: --mirr"),
        ([SCRIPT], f"error: {SCRIPT}: File exists; fix this and rerun, partial downloads are kept"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    _, errors = finish(start(*arguments), 2)
    assert any(message in line for line in errors)
    assert not Path("/s").exists()


def test_nothing_has_to_be_installed(site: Site, storage: Path, tmp_path: Path) -> None:
    """Without installed packages the program works; without tarfile's filter it says which Python has one."""
    code = "import sys; sys.path[0] = sys.argv.pop(1); from scripts.download_itm import main; main()"
    subprocess.run([sys.executable, "-S", "-c", code, ROOT, storage, "flickr", "--mirror", site.url], check=True, cwd=tmp_path)
    assert tree(storage) == expected(site.files)
    (tmp_path / "sitecustomize.py").write_text("import tarfile; del tarfile.data_filter")
    _, (line,) = finish(start(tmp_path / "new", PYTHONPATH=str(tmp_path)), 2)
    assert re.match(r"error: Python 3\..* cannot unpack archives safely; install 3\.10\.12, 3\.11\.4 or newer, or set", line)
    assert not (tmp_path / "new").exists()

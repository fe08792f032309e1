"""scripts/download_itm.sh as users start it: what it leaves, what it refuses, and that it can be interrupted at any moment."""

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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.image_db import ImageDatabase
from data.sources.download import DATASETS
from data.text_db import TextDatabase
from tests.conftest import BUNDLED
from tests.processes import ROOT
from tests.web import Fault, Site

SCRIPT = ROOT / "scripts/download_itm.sh"
BASE, LARGE = "pretrained/uniter-base.pt", "pretrained/uniter-large.pt"
IMAGES, TEST, VAL = "img_db/flickr30k.tar", "txt_db/itm_flickr30k_test.db.tar", "txt_db/itm_flickr30k_val.db.tar"
SUMS = "SHA256SUMS"
FLICKR = DATASETS["flickr"]
ADVICE = "; name a copy with --mirror URL, or a folder that has the file with --from DIR"


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


def partial(storage: Path, path: str) -> Path | None:
    return next((storage / path).parent.glob(f".{Path(path).name}.*.partial"), None)


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
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    return sorted(output.splitlines()), sorted(errors.splitlines())


Fetch = Callable[..., list[str]]


@pytest.fixture
def fetch(site: Site, storage: Path) -> Fetch:
    """Download flickr with these options, by default from the site; return the errors. A success leaves the whole tree."""

    def call(*options: object, code: int = 0, **environment: str) -> list[str]:
        site.requests.clear()
        _, errors = finish(start(storage, "flickr", *(options or ("--mirror", site.url)), **environment), code)
        assert all(line.startswith("error: ") for line in errors)
        assert bool(errors) == bool(code)
        assert code or tree(storage) == expected(site.files)
        return [line for line in errors if not line.endswith(" of 6 files are missing")]

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
    (storage / IMAGES).unlink()  # an archive that was unpacked is not needed
    before = {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}
    assert finish(start(storage, "all", "--mirror", site.url, "--jobs", 2)) == ([f"{storage}: complete"], [])
    assert finish(start(storage, "--from", "/", "coco")) == ([f"{storage}: complete"], [])
    assert site.requests == []
    assert before == {path: path.stat().st_mtime_ns for path in (storage, *storage.rglob("*"))}


def test_one_dataset_through_a_proxy(site: Site, storage: Path) -> None:
    proxy = site.url.removesuffix("/uniter")
    finish(start(storage, "--mirror", "http://mirror.invalid/uniter/", "coco", "--jobs", 1, http_proxy=proxy))
    assert tree(storage) == expected(site.files, "coco")
    assert {path for _, path, _ in site.requests} == {*DATASETS["coco"], SUMS}


def test_only_what_is_missing_is_requested(site: Site, storage: Path, fetch: Fetch) -> None:
    missing = {path: site.files.pop(path) for path in (LARGE, TEST)}
    lines = [f"error: {site.url}/{path}: The requested URL returned error: 404{ADVICE}" for path in missing]
    assert fetch(code=2) == lines
    assert set(FLICKR) & tree(storage).keys() == set(FLICKR) - set(missing)
    site.files |= missing
    for folder in storage.glob("txt_db/*.db"):
        shutil.rmtree(folder)
        folder.mkdir()
    for path in (IMAGES, BASE):
        (storage / path).with_name(f".{Path(path).name}.1.partial").write_bytes(
            b"left by a call before the user supplied the rest"
        )
    fetch()
    assert {path for _, path, _ in site.requests} == {*missing, SUMS}


def test_a_host_that_refuses_connections(storage: Path, fetch: Fetch) -> None:
    url = "http://127.0.0.1:9/uniter"
    for line, path in zip(fetch("--mirror", url, "--jobs", 9, code=2), sorted(FLICKR), strict=True):
        assert line.startswith(f"error: {url}/{path}: Failed to connect to 127.0.0.1 port 9")
        assert line.endswith(ADVICE)
    assert not storage.exists()


def test_checksums(site: Site, storage: Path, fetch: Fetch) -> None:
    site.files[SUMS] = b"<html>"
    assert f"{site.url}/{SUMS}: not a list of SHA-256 and paths" in fetch(code=2)[0]
    assert not storage.exists()
    site.files[SUMS] = sums({f"./{path}": contents for path, contents in site.files.items() if path not in (LARGE, SUMS)})
    right, site.files[BASE] = site.files[BASE], noise(30_000, 99)
    digests = [hashlib.sha256(contents).hexdigest() for contents in (site.files[BASE], right)]
    assert "{}/{}: its SHA-256 is {}, but SHA256SUMS says {}; rerun".format(site.url, BASE, *digests) in " ".join(fetch(code=2))
    assert set(tree(storage / "pretrained")) == {"uniter-large.pt"}
    site.files[BASE] = right
    fetch()


def test_a_damaged_archive_is_removed_unless_the_user_put_it_there(site: Site, storage: Path, fetch: Fetch) -> None:
    right, site.files[TEST] = site.files[TEST], site.files[VAL]
    line = f"{storage / TEST}: damaged or unsafe archive: member 'itm_flickr30k_val.db' is not a file or folder below"
    assert line in " ".join(errors := fetch(code=2))
    assert "it was removed, rerun" in " ".join(errors)
    assert "itm_flickr30k_test.db" not in " ".join(tree(storage))
    (storage / TEST).write_bytes(right[:-10_000])
    assert "remove it to have it downloaded" in " ".join(fetch(code=2))
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
    assert lines[4].startswith(f"error: {storage / IMAGES}: damaged or unsafe archive")
    assert not {TEST, LARGE, BASE, VAL, IMAGES, "finetune"} & tree(storage).keys()
    assert tree(folder) == before
    assert fetch("--from", tmp_path / "nowhere", code=2) == [f"error: --from {tmp_path / 'nowhere'}: no such folder"]
    for path in (IMAGES, BASE, VAL):
        (folder / path).unlink()
    fetch("--from", folder, "--mirror", site.url)
    assert {path for _, path, _ in site.requests} == {TEST, LARGE, IMAGES, BASE, VAL, SUMS}


def test_too_little_space(site: Site, storage: Path, fetch: Fetch) -> None:
    site.always = Fault(headers={"Content-Length": f"{10**17}"})
    (line,) = fetch(code=2)
    assert line.startswith(f"error: {storage}: archives and what they hold need 1,000,000,000.0 GB, but only ")
    assert not storage.exists()
    assert not any(method == "GET" for method, _, _ in site.requests)


def test_output_that_nobody_reads(site: Site, storage: Path) -> None:
    process = start(storage, "flickr", "--mirror", site.url)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE


def test_a_disk_that_refuses(storage: Path, fetch: Fetch) -> None:
    lay_out(storage, {"txt_db": b"a file of the user"})
    assert fetch(code=2) == [f"error: {storage}/txt_db: File exists; fix this and rerun, downloads are kept"]


def wait_for(storage: Path, path: str) -> None:
    """Wait until 8000 bytes of a download have arrived."""
    deadline = time.monotonic() + 10
    while (file := partial(storage, path)) is None or file.stat().st_size < 8000:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_while_downloading(site: Site, storage: Path, fetch: Fetch, number: int, code: int) -> None:
    """One call at a time; after SIGKILL curl continues, and excludes others until it ends."""
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    process = start(storage, "flickr", "--mirror", site.url)
    wait_for(storage, IMAGES)
    busy = [f"error: {storage}: another download, or a curl that it left, is running; wait for it or stop it"]
    assert fetch(code=2) == busy
    process.send_signal(number)
    assert finish(process, code)[1] == [f"interrupted by {signal.Signals(number).name}"] * (code > 0)
    if code < 0:
        assert fetch(code=2) == busy
        site.released.set()
        time.sleep(0.5)
    file = partial(storage, IMAGES)
    assert file is not None
    assert file.stat().st_size == 8000
    fetch()
    assert site.ranges(IMAGES) == ["bytes=8000-"]


SIGNALLING = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and ".flickr30k.partial/data.mdb" in str(arguments[0]):
        os.kill(os.getpid(), signal.Signals[os.environ["KILL"]])
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_ended_while_unpacking(site: Site, storage: Path, fetch: Fetch, tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNALLING)
    _, errors = finish(start(storage, "flickr", "--mirror", site.url, PYTHONPATH=str(tmp_path), KILL=name), code)
    assert errors == [f"interrupted by {name}"] * (code > 0)
    assert not (storage / "img_db/flickr30k").exists()
    fetch()
    assert site.ranges(IMAGES) == []


def test_a_status_line(site: Site, storage: Path) -> None:
    site.faults[IMAGES].append(Fault(sent=8000, stalls=True))
    screen, terminal = pty.openpty()
    process = subprocess.Popen(["bash", SCRIPT, storage, "flickr", "--mirror", site.url], stderr=terminal)
    os.close(terminal)
    seen = b""
    while not re.search(rb"\r[1-9][\d.]+% of 0\.0 GB\x1b\[K", seen):
        seen += os.read(screen, 1000)
    site.released.set()
    assert process.wait(10) == 0
    os.close(screen)


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
        ([SCRIPT], "File exists"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    _, errors = finish(start(*arguments), 2)
    assert any(message in line for line in errors)
    assert not Path("/s").exists()


def test_nothing_has_to_be_installed_but_curl(site: Site, storage: Path, tmp_path: Path) -> None:
    code = "import sys; sys.path[0] = sys.argv.pop(1); from scripts.download_itm import main; main()"
    words = [sys.executable, "-S", "-c", code, str(ROOT), str(storage), "flickr", "--mirror", site.url]
    subprocess.run(words, check=True, cwd=tmp_path)
    assert tree(storage) == expected(site.files)
    words[5] = "new"
    done = subprocess.run(words, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: curl: no such program; install the package curl\n")
    words[3] = f"import tarfile; del tarfile.data_filter; {code}"
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr.startswith("error: this Python cannot unpack archives safely; install 3.10.12, 3.11.4 or newer")
    assert not (tmp_path / "new").exists()

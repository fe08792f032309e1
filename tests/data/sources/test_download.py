"""What is left to do for a file, and archives that are truncated, damaged or hostile."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from pathlib import Path

import pytest

from data.sources.download import Damaged, Entry, unpack
from data.sources.mirror import Mirror, Version
from data.sources.threads import Pool
from tests.web import Site


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "top.tar"


def refusal(archive: Path) -> str:
    """Return why an archive is refused, of which nothing must be left."""
    with pytest.raises(Damaged) as refused:
        unpack(archive, archive.with_suffix(""), Pool(1))
    assert list(archive.parent.iterdir()) == [archive]
    assert str(refused.value).startswith(f"{archive}: ")
    return str(refused.value)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("../evil")], "'../evil' is not below top/"),
        ([member("top/../../evil")], "would be extracted to"),
        ([member("top/../evil")], "would be extracted to"),
        ([member("/tmp/evil")], "'/tmp/evil' is not below top/"),
        ([member("top/x", tarfile.SYMTYPE, "/etc")], "'top/x' is neither a file nor a folder"),
        ([member("top/x", tarfile.SYMTYPE, "y")], "'top/x' is neither"),
        ([member("top/x"), member("top/y", tarfile.LNKTYPE, "top/x")], "'top/y' is neither"),
        ([member("top/x", tarfile.CHRTYPE)], "'top/x' is neither"),
        ([member("top/x", tarfile.FIFOTYPE)], "'top/x' is neither"),
        ([member("top/x", size=-512)], "'top/x' is neither"),
        ([member("top/x"), member("topmost/x")], "'topmost/x' is not below top/"),
        ([member("top")], "damaged, or not a tar archive"),
        ([member("top/x"), member("top/x/y")], "damaged, or not a tar archive"),
        ([member("top", tarfile.DIRTYPE)], "holds no file of top/"),
        ([], "holds no file of top/"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_archives(archive: Path, members: list[tarfile.TarInfo], message: str, form: int) -> None:
    blocks = [info.tobuf(tarfile.GNU_FORMAT if info.size < 0 else form) for info in members]
    archive.write_bytes(b"".join(blocks) + bytes(10240))
    assert message in refusal(archive)
    assert not (archive.parent.parent / "evil").exists()
    assert not Path("/tmp/evil").exists()


def written(form: int, files: dict[str, bytes]) -> tuple[bytes, int]:
    """Return an archive of ``files`` below ./top/, and the position of the mark at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in (".", "./top"):
            tar.addfile(member(name, tarfile.DIRTYPE))
        for name, contents in files.items():
            tar.addfile(member(f"./top/{name}", size=len(contents)), io.BytesIO(contents))
        end = tar.offset
    return buffer.getvalue(), end


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_truncated_anywhere(archive: Path, form: int) -> None:
    long = "x" * 90 + "/" + "y" * (90 if form == tarfile.USTAR_FORMAT else 150)
    files = {name: random.Random(0).randbytes(700) for name in ("a", long, "last")}
    whole, end = written(form, files)
    for cut in sorted({block + more for block in range(0, end + 1024, 512) for more in (0, 1, 300)}):
        archive.write_bytes(whole[:cut])
        refusal(archive)
    archive.write_bytes(whole[: end + 1024])
    folder = archive.with_suffix("")
    unpack(archive, folder, Pool(1))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_an_archive_with_wrong_bytes(archive: Path) -> None:
    """Whatever is in it, it is refused or unpacked, and nothing is left beside."""
    whole, end = written(tarfile.GNU_FORMAT, {"a": bytes(700), "b/c": bytes(100), "d" * 120: b"1"})
    chance, refused = random.Random(0), 0
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 50))):
            damaged[chance.randrange(end)] = chance.randrange(256)
        archive.write_bytes(damaged)
        try:
            unpack(archive, archive.with_suffix(""), Pool(1))
        except Damaged:
            refused += 1
            assert list(archive.parent.iterdir()) == [archive]
        else:
            shutil.rmtree(archive.with_suffix(""))
    assert 20 < refused < 80


def test_what_is_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def left(path: str, folder: Path | None = None) -> tuple[int, int]:
        entry = Entry(tmp_path, path).plan(folder, Mirror(site.url, int, float))
        return entry.to_fetch, entry.to_unpack

    with Site() as site:
        site.files = {"model.pt": bytes(30_000), "images.tar": bytes(20_000)}
        (tmp_path / ".images.partial").mkdir()  # left by a killed call
        assert [left("model.pt"), left("images.tar")] == [(30_000, 0), (20_000, 20_000)]
        assert not (tmp_path / ".images.partial").exists()
        partial = Entry(tmp_path, "model.pt").partial
        partial.start(Version(30_000, "1"))
        partial.path.write_bytes(bytes(12_000))
        assert left("model.pt") == (18_000, 0)
        (tmp_path / "here").mkdir()
        (tmp_path / "here/images.tar").write_bytes(bytes(5000))
        assert left("images.tar", tmp_path / "here") == (0, 5000)
        (tmp_path / "images.tar").write_bytes(bytes(4000))
        assert left("images.tar") == (0, 4000)

"""Files of tensors. Full disks are in tests/test_resume.py; files that run code or fill the memory are in tests/fuzz."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from utils.errors import InputError
from utils.tensors import load_tensors, save_tensors

KEPT = {"weight": torch.arange(1000.0)}


def saved(legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(KEPT, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """Return the archive of ``saved`` as zipfile writes it, with some of its members replaced and others added."""
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(contents)).split("/")[0]
    contents |= {f"{folder}/{name.replace('_', '/')}": content for name, content in members.items()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return stream.getvalue()


def overlapping() -> bytes:
    """Return an archive with a large member that its directory lists twice."""
    data = zipped(data_1=bytes(10_000), data_2=b"")
    first, second = (data.index(name, data.index(b"PK\x01\x02")) - 46 for name in (b"archive/data/1", b"archive/data/2"))
    return data[:second] + data[first : first + 46] + data[second + 46 :]


@pytest.mark.parametrize("data", [saved(), saved(legacy=True), zipped()], ids=["today", "before torch 1.6", "zipfile"])
def test_containers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    assert torch.equal(load_tensors(tmp_path / "a.pt")["weight"], KEPT["weight"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zipped(zipfile.ZIP_DEFLATED), "compressed, overlap or have one name"),
        (overlapping(), "compressed, overlap or have one name"),
        (zipped(DATA_0=bytes(4000)), "compressed, overlap or have one name"),
        (b"PK\x03\x04" + saved() + saved(), "compressed, overlap or have one name"),  # two directories
        (zipped(data_0=bytes(3996)), "storage '0' is missing or does not have 4,000 bytes"),
        (saved(legacy=True).replace(struct.pack("<H", 1000), struct.pack("<H", 60_000)), "tensors take 240,000 bytes"),
        (zipped(**{"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"."}), "KeyError"),  # a bytearray of 1 GiB
        (zipped(**{"data.pkl": b"\x80\x02ccollections\nOrderedDict\n]\x85R."}), "TypeError"),  # copies what it is given
        (saved()[:3000], "BadZipFile"),
        (saved(legacy=True)[:3000], r"tensors take 4,000 bytes, the file has 3,000"),
        (b"", "EOFError"),
    ],
)
def test_files_to_refuse(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(InputError, match=rf"a.pt: not a readable checkpoint of tensors \(.*{reason}"):
        load_tensors(tmp_path / "a.pt")


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.zeros(3)}, "optimiser": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    save_tensors(tmp_path / "state.pt", state)
    before = (tmp_path / "state.pt").read_bytes()
    for spoilt in (state["model"]["weight"], state["optimiser"]["state"][0]["exp_avg"]):
        spoilt[1] = torch.nan
        with pytest.raises(InputError, match=r"state.pt: not written, .* (weight|exp_avg) is not finite"):
            save_tensors(tmp_path / "state.pt", state)
        spoilt[1] = 0
    assert (tmp_path / "state.pt").read_bytes() == before

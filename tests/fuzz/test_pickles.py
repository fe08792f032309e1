"""Nothing that is read runs the pickle, or the Python source, that it carries."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack_numpy
import numpy as np
import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from data.records import read_msgpack, read_npz
from data.sources.plain_pickle import read_plain
from data.sources.region_files import load_npy_pair, load_npz
from model.checkpoint import read_state_dict
from tests.data.sources.detectors import Detected, save_milvlg, save_mmf
from tests.fuzz.checkpoints import pickle_of, saved, with_pickle

FOUND = Detected(0)
SHARES = np.zeros((15, 6), np.float32)


class Plant:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    return Plant(tmp_path / "planted")


def objects(value: object) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = value
    return array


def zipped(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy_with_header(header: str) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def reads(data: bytes, read: Callable[[bytes], object]) -> None:
    with pytest.raises(ValueError, match=r"pickle|object|would call|plain|header"):
        read(data)


def test_records(plant: Plant) -> None:
    array = objects(plant)
    record = msgpack_numpy.packb({"features": array, "norm_bb": SHARES})
    assert b"planted" in record
    wanted = ("features", "norm_bb")
    without_kind = record.replace(b"kind\xc4\x01O", b"kind\xc4\x00")
    with_type = without_kind.replace(b"\x91\x92\xa0\xa2|O", b"\xa2|O")
    assert len({len(record), len(without_kind), len(with_type)}) == 3
    for data in (record, without_kind, with_type):
        reads(data, lambda data: read_msgpack(data, wanted))
    reads(zipped(features=array, norm_bb=SHARES), lambda data: read_npz(data, wanted))
    source = f"__import__('pathlib').Path({str(plant.file)!r}).touch()"
    for header in (source, f"{{'descr': {source}, 'fortran_order': False, 'shape': ()}}"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("features.npy", npy_with_header(header))
        reads(stream.getvalue(), lambda data: read_npz(data, wanted))
    assert not plant.file.exists()


def test_detectors_files(plant: Plant, tmp_path: Path) -> None:
    save_milvlg(tmp_path / "a.npz", FOUND, info={"objects_conf": plant})
    save_milvlg(tmp_path / "b.npz", FOUND, x=objects(plant))
    np.savez(tmp_path / "c.npz", features=objects(plant), norm_bb=SHARES, conf=FOUND.conf)
    for name in "abc":
        with pytest.raises(ValueError, match=r"would call|object"):
            load_npz(tmp_path / f"{name}.npz")
    save_mmf(tmp_path / "a.npy", FOUND, bbox=plant)
    with pytest.raises(ValueError, match="would call"):
        load_npy_pair(tmp_path / "a.npy")
    save_mmf(tmp_path / "b.npy", FOUND)
    np.save(tmp_path / "b.npy", objects(plant))
    with pytest.raises(ValueError, match="object"):
        load_npy_pair(tmp_path / "b.npy")
    for protocol in range(6):
        reads(pickle.dumps({"a": plant}, protocol), lambda data: read_plain(data, ["a"]))
    assert not plant.file.exists()


def torchscript(archive: bytes) -> bytes:
    """A zip of ``torch.save`` with what makes torch take it for a TorchScript archive, which older releases load as that."""
    stream = io.BytesIO(archive)
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr(f"{file.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(()))
    return stream.getvalue()


def tar_like_pickles(member: bytes) -> bytes:
    """The container of torch's first releases; a name in it reads as the pickles that the later one begins with."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("name", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(member)
            archive.addfile(entry, io.BytesIO(member))
    data = bytearray(stream.getvalue())
    values: tuple[object, ...] = (MAGIC_NUMBER, PROTOCOL_VERSION, {}, {}, [])
    data[:100] = b"".join(pickle.dumps(value, 2) for value in values).ljust(100, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def test_checkpoints(plant: Plant, tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(2)}
    archive, planted = saved(weights), pickle.dumps(plant, 2)
    legacy = saved({**weights, "planted": plant}, legacy=True)
    inputs = {
        "pickle": (planted, "would call"),
        "zip": (saved({**weights, "planted": plant}), "would call"),
        "before 1.6": (legacy, "would call"),
        "before 1.6, behind another pickle": (planted + legacy, "would call"),
        "TorchScript": (torchscript(with_pickle(archive, planted)), "not an archive of torch.save"),
        "tar": (tar_like_pickles(planted), "a tar archive"),
        **{f"protocol {n}": (with_pickle(archive, pickle.dumps({"a": plant}, n)), "would call|instruction") for n in range(6)},
    }
    file = tmp_path / "model.pt"
    for name, (data, message) in inputs.items():
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"model.pt: not a readable checkpoint of tensors \(.*({message})"):
            read_state_dict(file)
        assert not plant.file.exists(), name
    file.write_bytes(with_pickle(archive, pickle_of(archive)))
    assert torch.equal(read_state_dict(file)["weight"], weights["weight"])


def test_these_pickles_would_have_run(plant: Plant, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", objects(plant))
    file = tmp_path / "a.pt"
    for run in (
        lambda: np.load(tmp_path / "a.npy", allow_pickle=True),
        lambda: msgpack_numpy.unpackb(msgpack_numpy.packb({"a": objects(plant)})),
        lambda: torch.load(file, weights_only=False),
    ):
        file.write_bytes(saved(plant))
        plant.file.unlink(missing_ok=True)
        run()
        assert plant.file.exists()

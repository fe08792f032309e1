"""No reader runs the pickle, or the Python source, that a file carries."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack_numpy
import numpy as np
import pytest
import torch

from data.records import read_msgpack, read_npz
from data.sources.region_files import load_npy_pair, load_npz
from model.checkpoint import read_state_dict
from tests.data.sources.detectors import Detected, save_milvlg, save_mmf
from tests.fuzz.test_fuzz import npy, pickle_of, saved, with_pickle, zipped

FOUND = Detected(0)
WANTED = ("features", "norm_bb")


class Plant:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """A pickle that no reader of the test may run."""
    plant = Plant(tmp_path / "planted")
    yield plant
    assert not plant.file.exists()


def objects(value: object) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = value
    return array


def refuses(read: Callable[..., object], *arguments: Any, message: str = "object|would call|header|instruction") -> None:
    with pytest.raises(ValueError, match=message):
        read(*arguments)


def test_records(plant: Plant) -> None:
    record = msgpack_numpy.packb({"features": objects(plant), "norm_bb": FOUND.shares()})
    assert b"planted" in record
    without_kind = record.replace(b"kind\xc4\x01O", b"kind\xc4\x00")
    with_type = without_kind.replace(b"\x91\x92\xa0\xa2|O", b"\xa2|O")
    assert len({len(record), len(without_kind), len(with_type)}) == 3
    for data in (record, without_kind, with_type):
        refuses(read_msgpack, data, WANTED, message="object|plain")
    source = f"__import__('pathlib').Path({str(plant.file)!r}).touch()"
    for header in (source, f"{{'descr': {source}, 'fortran_order': False, 'shape': ()}}"):
        member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        refuses(read_npz, zipped({"features": member}), WANTED)
    refuses(read_npz, zipped({"features": npy(objects(plant))}), WANTED)


def test_detectors_files(plant: Plant, tmp_path: Path) -> None:
    npz, pair, info = (tmp_path / name for name in ("a.npz", "a.npy", "a_info.npy"))
    save_milvlg(npz, FOUND, info={"objects_conf": plant})
    refuses(load_npz, npz)
    save_milvlg(npz, FOUND, x=objects(plant))
    refuses(load_npz, npz)
    np.savez(npz, features=objects(plant), norm_bb=FOUND.shares(), conf=FOUND.conf)
    refuses(load_npz, npz)
    save_mmf(pair, FOUND)
    header = info.read_bytes()[: info.read_bytes().index(b"\n") + 1]
    for protocol in range(6):
        info.write_bytes(header + pickle.dumps({"bbox": plant}, protocol))
        refuses(load_npy_pair, pair)
    save_mmf(pair, FOUND)
    np.save(pair, objects(plant))
    refuses(load_npy_pair, pair)


def torchscript(archive: bytes) -> bytes:
    """A zip of ``torch.save`` with the member that makes it a TorchScript archive to torch."""
    stream = io.BytesIO(archive)
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr(f"{file.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(()))
    return stream.getvalue()


def tar(member: bytes) -> bytes:
    """The container of torch's first releases."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(member)
            archive.addfile(entry, io.BytesIO(member))
    return stream.getvalue()


def test_checkpoints(plant: Plant, tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(2)}
    archive, planted = saved(weights), pickle.dumps(plant, 2)
    legacy = saved({**weights, "planted": plant}, legacy=True)
    inputs = {
        "pickle": planted,
        "zip": saved({**weights, "planted": plant}),
        "before 1.6": legacy,
        "before 1.6, behind another pickle": planted + legacy,
        "TorchScript": torchscript(with_pickle(archive, planted)),
        "tar": tar(planted),
        **{f"protocol {number}": with_pickle(archive, pickle.dumps({"a": plant}, number)) for number in range(6)},
    }
    file = tmp_path / "model.pt"
    for name, data in inputs.items():
        file.write_bytes(data)
        refuses(read_state_dict, file, message=r"model.pt: not a readable checkpoint of tensors \(")
        assert not plant.file.exists(), name
    file.write_bytes(with_pickle(archive, pickle_of(archive)))
    assert torch.equal(read_state_dict(file)["weight"], weights["weight"])


def test_unsafe_readers_run_these_pickles(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "planted")
    np.save(tmp_path / "a.npy", objects(plant))
    for run in (
        lambda: np.load(tmp_path / "a.npy", allow_pickle=True),
        lambda: msgpack_numpy.unpackb(msgpack_numpy.packb({"a": objects(plant)})),
        lambda: torch.load(io.BytesIO(saved(plant)), weights_only=False),
    ):
        plant.file.unlink(missing_ok=True)
        run()
        assert plant.file.exists()

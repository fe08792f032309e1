"""No reader runs the pickle, or the Python source, that a file carries."""

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

from data.records import read_msgpack, read_npz
from data.sources.region_files import load_npy_pair, load_npz
from model.checkpoint import read_state_dict
from tests.data.sources.detectors import Detected, save_milvlg, save_mmf
from tests.fuzz.test_fuzz import npy, pickle_of, saved, with_pickle, zipped

FOUND = Detected(0)
WEIGHTS = {"weight": torch.zeros(2)}


class Plant:
    """Creates a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "planted"

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")

    def refused(self, read: Callable[..., object], *arguments: Any, message: str = "object|would call|header|instruct") -> None:
        with pytest.raises(ValueError, match=message):
            read(*arguments)
        assert not self.file.exists()


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    return Plant(tmp_path)


def test_records(plant: Plant) -> None:
    record = msgpack_numpy.packb({"features": np.array([plant]), "norm_bb": FOUND.shares()})
    assert b"planted" in record
    without_kind = record.replace(b"kind\xc4\x01O", b"kind\xc4\x00")
    with_type = without_kind.replace(b"\x91\x92\xa0\xa2|O", b"\xa2|O")
    assert len(record) > len(without_kind) > len(with_type)
    wanted = "features", "norm_bb"
    for data in (record, without_kind, with_type):
        plant.refused(read_msgpack, data, wanted, message="object|plain")
    source = f"__import__('pathlib').Path({str(plant.file)!r}).touch()"
    headers = source, f"{{'descr': {source}, 'fortran_order': False, 'shape': ()}}"
    members = [b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() for header in headers]
    for member in (*members, npy(np.array([plant]))):
        plant.refused(read_npz, zipped({"features": member}), wanted)


def test_detectors_files(plant: Plant, tmp_path: Path) -> None:
    npz, pair, info = (tmp_path / name for name in ("a.npz", "a.npy", "a_info.npy"))
    for planted in ({"info": {"objects_conf": plant}}, {"x": np.array([plant])}):
        save_milvlg(npz, FOUND, **planted)
        plant.refused(load_npz, npz)
    np.savez(npz, features=np.array([plant]), norm_bb=FOUND.shares(), conf=FOUND.conf)
    plant.refused(load_npz, npz)
    save_mmf(pair, FOUND)
    whole = info.read_bytes()
    for protocol in range(6):
        info.write_bytes(whole[: whole.index(b"\n") + 1] + pickle.dumps({"bbox": plant}, protocol))
        plant.refused(load_npy_pair, pair)
    info.write_bytes(whole)
    np.save(pair, np.array([plant]))
    plant.refused(load_npy_pair, pair)


def test_checkpoints(plant: Plant, tmp_path: Path) -> None:
    archive, legacy, planted = saved(WEIGHTS), saved({"planted": plant}, legacy=True), pickle.dumps(plant, 2)
    torchscript, tar = io.BytesIO(with_pickle(archive, planted)), io.BytesIO()
    with zipfile.ZipFile(torchscript, "a") as script:
        script.writestr(f"{script.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(()))
    with tarfile.open(fileobj=tar, mode="w") as first_releases:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(planted)
            first_releases.addfile(entry, io.BytesIO(planted))
    file = tmp_path / "model.pt"
    protocols = [with_pickle(archive, pickle.dumps({"a": plant}, protocol)) for protocol in range(6)]
    zips = [saved({**WEIGHTS, "planted": plant}), torchscript.getvalue(), *protocols]
    for data in (planted, legacy, planted + legacy, tar.getvalue(), *zips):
        file.write_bytes(data)
        plant.refused(read_state_dict, file, message=r"model.pt: not a readable checkpoint of tensors \(")
    file.write_bytes(with_pickle(archive, pickle_of(archive)))
    assert torch.equal(read_state_dict(file)["weight"], WEIGHTS["weight"])


def test_unsafe_readers_run_these_pickles(plant: Plant) -> None:
    for run in (
        lambda: np.load(io.BytesIO(npy(np.array([plant]))), allow_pickle=True),
        lambda: msgpack_numpy.unpackb(msgpack_numpy.packb({"a": np.array([plant])})),
        lambda: torch.load(io.BytesIO(saved(plant)), weights_only=False),
    ):
        run()
        plant.file.unlink()

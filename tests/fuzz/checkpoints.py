"""Targets: checkpoints in both of torch's containers, and the JSON that describes the model they belong to."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from model.checkpoint import load_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from tests.conftest import BUNDLED
from tests.fuzz.mutations import Seed, mutated, zip_seed
from tests.fuzz.sources import pickle_seed
from tests.fuzz.target import MIB, Target
from tests.fuzz.values import json_like
from utils.tensors import load_tensors

SMALL = UniterConfig(
    vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, max_position_embeddings=8,
    img_dim=4,
)  # fmt: skip


def saved(value: Any, *, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes, in the container of today or in that of before torch 1.6."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def with_pickle(archive: bytes, pickled: bytes) -> bytes:
    """The zip of ``torch.save`` with another ``data.pkl``, all its checksums right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith("/data.pkl") else old.read(member))
    return stream.getvalue()


def pickle_of(archive: bytes) -> bytes:
    """The ``data.pkl`` of a zip of ``torch.save``."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


def checkpoint_targets(folder: Path) -> list[Target]:
    """Checkpoints of a small model, the golden one, and a training state."""
    model = RetrievalModel(SMALL)
    path = folder / "model.pt"

    def load(data: bytes) -> None:
        path.write_bytes(data)
        load_checkpoint(model, path)

    def load_state(data: bytes) -> None:
        path.write_bytes(data)
        load_tensors(path)

    weights = OrderedDict(model.state_dict())
    today, legacy = saved(weights), saved(weights, legacy=True)
    optimiser = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5, dtype=torch.bfloat16), "seed": torch.get_rng_state()[:64]}
    state = saved(
        {"model": dict(list(weights.items())[:3]), "optimiser": {"state": {0: optimiser}}, "progress": {"updates": 3}}
    )
    golden = (BUNDLED.folder / "model.pt").read_bytes()
    pickled = mutated([pickle_seed(pickle_of(today))])
    return [
        Target("checkpoint: zip", load, mutated([zip_seed(today)]), today),
        Target("checkpoint: pickle in the zip", load, pickled.map(lambda data: with_pickle(today, data)), today),
        Target(
            "checkpoint: before torch 1.6",
            load,
            mutated([_legacy_seed(legacy)] * 9 + [_legacy_seed(golden)]),
            legacy,
            memory=128 * MIB,
        ),
        Target("training state", load_state, mutated([zip_seed(state)]), state),
        _configuration_target(folder),
    ]


def _legacy_seed(data: bytes) -> Seed:
    """A file of torch before 1.6: five pickles, then for each storage the number of its elements and their bytes."""
    fields: list[tuple[int, int]] = []
    start = 0
    for _ in range(5):
        fields += pickle_seed(data, start).fields
        start = fields[-1][0]  # the last instruction ends a pickle
    return Seed(data, [*fields, (start, 8)])


def _configuration_target(folder: Path) -> Target:
    path = folder / "model.json"
    config = json.loads((BUNDLED.folder / "model.json").read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        UniterConfig.from_json(path)

    sound = json.dumps(config).encode()
    return Target("model configuration", read, st.one_of(json_like([config]), mutated([Seed(sound)])), sound)

"""Drawn scenes shared by the tests of evaluation scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.scenes.dataset import Recipe
from examples.scenes.files import make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from scripts import convert_imgdir, create_txtdb

ROOT = Path(__file__).resolve().parent.parent.parent
TEST_IMAGES = 6


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes, all of them twins, with databases of their test split and a random model."""

    folder: Path

    @property
    def examples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "scenes/winoground/examples.jsonl").read_text().splitlines()]

    def options(self, output: Path, **changes: object) -> list[str]:
        given: dict[str, object] = {
            "img_db": self.folder / "db", "checkpoint": self.folder / "model.pt", "model_config": self.folder / "model.json",
            "output_dir": output, "device": "cpu",
        }  # fmt: skip
        return [word for name, value in (given | changes).items() if value for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder / "scenes", {"train": 1, "val": 1, "test": TEST_IMAGES}, Recipe(seed=0, twins=1.0), 1)
    features, annotations = str(folder / "scenes/features"), str(folder / "scenes/dataset_scenes.json")
    convert_imgdir.main(["--img_dir", features, "--output", str(folder / "db"), "--keep_all", "--nproc", "1"])
    texts = str(folder / "itm_test.db")
    create_txtdb.main(["--annotations", annotations, "--split", "test", "--output", texts, "--nproc", "1"])
    torch.manual_seed(0)
    (folder / "model.json").write_bytes((ROOT / "config/uniter-tiny.json").read_bytes())
    save_checkpoint(folder / "model.pt", RetrievalModel(UniterConfig.from_json(folder / "model.json")).state_dict())
    return Scenes(folder)

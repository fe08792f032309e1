"""Fixtures shared by all tests. GOLDEN_DIR points the golden tests at another folder of the layout of tests/golden."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the programs that tests start share the machine

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.split import RetrievalSplit
from model.checkpoint import load_checkpoint
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.retrieval import ComputeSettings, RetrievalModel
from utils.precision import Precision

# A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

CPU = torch.device("cpu")


class Golden:
    """The golden folder: its arrays, its databases, its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays = np.load(folder / "golden.npz", allow_pickle=False)
        self.recall: dict[str, Any] = json.loads((folder / "recall.json").read_text())
        self.text_db = next(path.parent for path in (folder / "db/txt_db").glob("*/meta.json"))
        self.image_db = next(path.parent.parent for path in (folder / "db/img_db").glob("*/*/data.mdb"))
        self.config = UniterConfig.from_json(folder / "model.json")

    def model(self) -> RetrievalModel:
        model = RetrievalModel(self.config)
        assert load_checkpoint(model, self.folder / "model.pt").head == "rank_output"
        return model

    def source(self, max_txt_len: int = -1) -> RetrievalSplit:
        return RetrievalSplit(str(self.text_db), str(self.image_db), self.config.input_limits, max_txt_len=max_txt_len)

    def halves(self) -> list[str]:
        """The prefixes of the stored halves, such as ``V_singular_0``."""
        return sorted({key.split("/")[0] for key in self.arrays.files if key[:2] in ("V_", "L_")})


BUNDLED = Golden(Path(__file__).parent / "golden")
GOLDEN = Golden(Path(os.environ["GOLDEN_DIR"])) if os.environ.get("GOLDEN_DIR") else BUNDLED


@pytest.fixture
def golden() -> Golden:
    """What numbers are compared with; the folder that GOLDEN_DIR names, if it names one."""
    return GOLDEN


@pytest.fixture
def bundled() -> Golden:
    """Databases of known size to test on, whatever GOLDEN_DIR says."""
    return BUNDLED


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled texts, but only the first of each image: every image is read, and a fifth of the pairs scored."""
    folder = tmp_path_factory.mktemp("few") / "itm_few_test.db"
    shutil.copytree(BUNDLED.text_db, folder)
    texts_of, lengths = (json.loads((folder / name).read_text()) for name in ("img2txts.json", "id2len.json"))
    first = {texts[0] for texts in texts_of.values()}
    (folder / "id2len.json").write_text(json.dumps({text: length for text, length in lengths.items() if text in first}))
    return folder


@pytest.fixture
def compute() -> ComputeSettings:
    """The reference arithmetic, fp32 on the CPU."""
    return ComputeSettings(Precision("fp32", CPU), ChunkSize())


@pytest.fixture
def loader() -> Loader:
    return Loader(CPU)


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())

"""A killed evaluation goes on where it stopped, and only with the same model and data."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inf_itm
from data.loader import Loader
from evaluation import scoring, unfinished
from evaluation.scoring import score_matrix
from model.retrieval import ComputeSettings
from tests.conftest import BUNDLED
from tests.launch import LAUNCHERS, finish, run, start
from tests.test_programs import fails, inference
from utils.distributed import SingleProcess

DATABASES = BUNDLED.text_db, BUNDLED.image_db


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    inf_itm.main(inference(*DATABASES, folder))
    return folder


KILLED = """
import sys
import evaluation.scoring, inf_itm
from tests.killer import at_call
at_call(evaluation.scoring, "_score_block", 5)()
inf_itm.main(sys.argv[1:])
"""


def killed(folder: Path) -> None:
    """An evaluation that SIGKILL ends when four blocks of texts are done."""
    process = start("", 1, sys.executable, "-c", KILLED, *inference(*DATABASES, folder))
    output = finish(process, 60)
    assert process.returncode == -signal.SIGKILL, output


def assert_same_scores(one: Path, other: Path) -> None:
    first, second = (np.load(folder / "scores.npz") for folder in (one, other))
    assert np.array_equal(first["scores"], second["scores"])
    of_one, of_other = (json.loads((folder / "scores.json").read_text()) for folder in (one, other))
    for key in of_one.keys() - {"seconds", "provenance"}:
        assert of_one[key] == of_other[key]
    assert {path.name for path in other.iterdir()} == {"scores.npz", "scores.json"}


def test_goes_on_where_it_stopped(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path / "out")
    done = int((~np.isnan(np.load(tmp_path / "out/scores.partial.npy")).any(axis=1)).sum())
    assert done == 4 * scoring.TEXTS_PER_BLOCK
    scored: list[str] = []
    score_block = scoring._score_block

    def recording(model: Any, compute: Any, batch: Any, *rest: Any) -> np.ndarray:
        scored.extend(batch.text_ids)
        return score_block(model, compute, batch, *rest)

    monkeypatch.setattr(scoring, "_score_block", recording)
    inf_itm.main(inference(*DATABASES, tmp_path / "out"))
    assert len(scored) == 200 - done
    assert_same_scores(whole, tmp_path / "out")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_workers_go_on_where_one_process_stopped(tmp_path: Path, whole: Path, launcher: str) -> None:
    killed(tmp_path / "out")
    output = run(launcher, 2, sys.executable, "inf_itm.py", *inference(*DATABASES, tmp_path / "out"))
    assert "going on with" in output
    assert output.count("counted as published") == 1
    assert_same_scores(whole, tmp_path / "out")


def test_only_with_the_same_model_and_data(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path / "out")
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    torch.save(state | {"rank_output.bias": state["rank_output.bias"] + 1}, tmp_path / "other.pt")
    shutil.copytree(BUNDLED.text_db, tmp_path / "texts.db")
    lengths = json.loads((tmp_path / "texts.db/id2len.json").read_text())
    (tmp_path / "texts.db/id2len.json").write_text(json.dumps(dict(sorted(lengths.items(), reverse=True))))

    def line(**changes: object) -> str:
        return fails(capsys, inf_itm.main, inference(*DATABASES, tmp_path / "out") + words(changes))

    def words(changes: dict[str, object]) -> list[str]:
        return [word for name, value in changes.items() for word in (f"--{name}", str(value))]

    before = (tmp_path / "out/scores.partial.npy").read_bytes()
    assert "of an unfinished evaluation with other checkpoint, expected the same" in line(checkpoint=tmp_path / "other.pt")
    assert "with other precision, expected" in line(precision="bf16")
    assert "with other txt_db, expected" in line(txt_db=tmp_path / "texts.db")
    assert "with other img_db, expected" in line(conf_th=0.5) or "no such image database" in line(conf_th=0.5)
    assert (tmp_path / "out/scores.partial.npy").read_bytes() == before

    shutil.copytree(BUNDLED.text_db, tmp_path / "moved.db")
    inf_itm.main(inference(*DATABASES, tmp_path / "out", batch_size=100) + words({"txt_db": tmp_path / "moved.db"}))
    np.testing.assert_allclose(
        np.load(tmp_path / "out/scores.npz")["scores"], np.load(whole / "scores.npz")["scores"], rtol=1e-5, atol=1e-5
    )


def test_a_large_matrix_lies_in_a_file(monkeypatch: pytest.MonkeyPatch, compute: ComputeSettings, loader: Loader) -> None:
    """That of a validation, too, which nobody goes on with."""
    source, model = BUNDLED.source(), BUNDLED.model()
    in_memory = score_matrix(model, source, compute, loader, SingleProcess())
    monkeypatch.setattr(unfinished, "IN_MEMORY_BYTES", 4 * 200 * 40 - 1)
    on_disk = score_matrix(model, source, compute, loader, SingleProcess())
    assert not isinstance(in_memory.scores, np.memmap)
    assert isinstance(on_disk.scores, np.memmap)
    assert np.array_equal(in_memory.scores, on_disk.scores)


def test_a_disk_too_small_for_it_says_so_first() -> None:
    program = (
        "import resource; from evaluation import unfinished; unfinished.IN_MEMORY_BYTES = 0;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); unfinished.unscored((200, 100))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "InputError" in done.stderr
    assert "no room for 80,000 bytes of scores" in done.stderr


def test_a_damaged_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path / "out")
    matrix = tmp_path / "out/scores.partial.npy"
    matrix.write_bytes(matrix.read_bytes()[:5000])
    message = fails(capsys, inf_itm.main, inference(*DATABASES, tmp_path / "out"))
    assert "scores.partial.npy: cannot be read" in message
    assert "remove scores.partial.* to start anew" in message

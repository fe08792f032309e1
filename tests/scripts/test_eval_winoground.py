"""The program on twins of drawn scenes, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase
from evaluation import winoground
from evaluation.retriever import Retriever
from scripts.eval_winoground import main
from tests.conftest import BUNDLED
from tests.scripts.conftest import ROOT, TEST_IMAGES, Scenes
from tests.test_programs import fails
from utils.files import sha256


def options(scenes: Scenes, output: Path, **changes: object) -> list[str]:
    return scenes.options(output, **{"examples": scenes.folder / "scenes/winoground/examples.jsonl"} | changes)


def saved_scores(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


def one_at_a_time(scenes: Scenes, **boxes: Any) -> np.ndarray:
    """(E, 2, 2): the scores of all examples, each pair in a separate batch."""
    retriever = Retriever.from_checkpoint(scenes.folder / "model.pt", scenes.folder / "model.json", device="cpu")
    database = ImageDatabase(scenes.folder / "db", BoxRule(**boxes))

    def score(row: dict[str, str], caption: int, image: int) -> float:
        return retriever.score([row[f"caption_{caption}"]], [database[row[f"image_{image}"] + ".npz"]]).item()

    scores = [[[score(row, caption, image) for image in (0, 1)] for caption in (0, 1)] for row in scenes.examples]
    database.close()
    return np.array(scores)


def test_twins(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = ImageDatabase.__getitem__
    monkeypatch.setattr(ImageDatabase, "__getitem__", lambda database, name: (reads.append(name), read(database, name))[1])
    main(options(scenes, tmp_path / "whole"))
    assert len(reads) == len(set(reads)) == TEST_IMAGES
    monkeypatch.setattr(winoground, "EXAMPLES_PER_BATCH", 4)
    main(options(scenes, tmp_path / "parts"))
    assert len(reads) == 2 * TEST_IMAGES

    expected = one_at_a_time(scenes)
    correct = winoground.outcomes(expected)
    assert len(expected) == TEST_IMAGES  # two examples for each pair of twins
    for name in ("whole", "parts"):
        lines = saved_scores(tmp_path / name)
        np.testing.assert_allclose([line["scores"] for line in lines], expected, atol=1e-5)
        assert [line["id"] for line in lines] == list(range(6))
        for score, values in correct.items():
            assert [line[score] for line in lines] == values.tolist()
    results = json.loads((tmp_path / "whole/winoground.json").read_text())
    assert {score: results[score] for score in correct} == {score: pytest.approx(v.mean()) for score, v in correct.items()}
    assert results["counts"] == {"examples": 6, "image_pairs": 3, "images": 6}
    assert results["by_tag"]["collapsed_tag"]["Object"]["examples"] == 6
    origin = results["provenance"]
    assert origin["checkpoint_sha256"] == sha256(scenes.folder / "model.pt")
    assert (origin["precision"], origin["device"], origin["vocabulary"]) == ("fp32", "cpu", "bert-base-cased")
    assert origin["image_db"]["images"] == 8
    assert f"{100 * results['image']:.2f}" in capsys.readouterr().out.splitlines()[1]
    assert "winoground.json: already exists" in fails(capsys, main, options(scenes, tmp_path / "whole"))


def test_as_a_process_with_the_settings_of_a_training(tmp_path: Path, scenes: Scenes) -> None:
    """Its boxes, and the model.json beside them."""
    (tmp_path / "model.json").write_bytes((scenes.folder / "model.json").read_bytes())
    (tmp_path / "hps.json").write_text(json.dumps({"max_bb": 5, "min_bb": 2, "learning_rate": 1}))
    words = options(scenes, tmp_path / "out", model_config="", train_config=tmp_path / "hps.json")
    subprocess.run([sys.executable, "scripts/eval_winoground.py", *words], cwd=ROOT, check=True, capture_output=True)
    expected = one_at_a_time(scenes, max_bb=5, min_bb=2)
    np.testing.assert_allclose([line["scores"] for line in saved_scores(tmp_path / "out")], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": ""}, "examples is missing"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"img_db": BUNDLED.image_db}, "line 1: image 'scenes_"),
        (
            {"checkpoint": BUNDLED.folder / "model.pt", "model_config": BUNDLED.folder / "model.json"},
            "width 2048, the model has img_dim 64",
        ),
    ],
    ids=str,
)
def test_one_line_errors(
    tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in fails(capsys, main, options(scenes, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_captions_that_cannot_be_scored(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "examples.jsonl"
    for caption, message in (("\u0000", "no word pieces"), ("a " * 200, "200 word pieces, expected at most")):
        rows = [*scenes.examples[:2], scenes.examples[2] | {"caption_1": caption}]
        path.write_text("\n".join(map(json.dumps, rows)))
        line = fails(capsys, main, options(scenes, tmp_path / "out", examples=path))
        assert f"{path}: line 3: caption_1: " in line
        assert message in line

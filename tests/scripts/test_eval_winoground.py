"""The program on twins of drawn scenes, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import collate
from data.boxes import BoxRule
from data.image_db import Image, ImageDatabase, ImageDatabaseWriter
from data.text_db import Text
from data.tokenizer import load_tokenizer
from evaluation import winoground
from examples.scenes.dataset import Recipe
from examples.scenes.files import make_scenes
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import UniterConfig
from model.retrieval import ComputeSettings, RetrievalModel
from scripts import convert_imgdir
from scripts.eval_winoground import main
from tests import test_programs
from tests.conftest import BUNDLED
from utils.files import sha256

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Scenes:
    """Twins of drawn scenes, their image database and a random model."""

    folder: Path

    @property
    def examples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "scenes/winoground/examples.jsonl").read_text().splitlines()]

    def options(self, output: Path, **changes: object) -> list[str]:
        given: dict[str, object] = {
            "examples": self.folder / "scenes/winoground/examples.jsonl", "img_db": self.folder / "db",
            "checkpoint": self.folder / "model.pt", "model_config": self.folder / "model.json",
            "output_dir": output, "device": "cpu",
        }  # fmt: skip
        return [word for name, value in (given | changes).items() if value for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("winoground")
    make_scenes(folder / "scenes", {"train": 1, "val": 1, "test": 6}, Recipe(seed=0, twins=1.0), 1)
    features = str(folder / "scenes/features")
    convert_imgdir.main(["--img_dir", features, "--output", str(folder / "db"), "--keep_all", "--nproc", "1"])
    torch.manual_seed(0)
    config = UniterConfig.from_json(ROOT / "config/uniter-tiny.json")
    save_checkpoint(folder / "model.pt", RetrievalModel(config).state_dict())
    (folder / "model.json").write_bytes((ROOT / "config/uniter-tiny.json").read_bytes())
    return Scenes(folder)


def one_at_a_time(scenes: Scenes, compute: ComputeSettings, **settings: Any) -> np.ndarray:
    """(E, 2, 2): the scores of all examples, each pair in a batch of its own."""
    config = UniterConfig.from_json(scenes.folder / "model.json")
    model, tokenizer = RetrievalModel(config).eval(), load_tokenizer()
    load_checkpoint(model, scenes.folder / "model.pt")
    database = ImageDatabase(scenes.folder / "db", BoxRule(**settings))
    cls_id, sep_id = tokenizer.ids["[CLS]"], tokenizer.ids["[SEP]"]

    def score(caption: str, image: Image) -> float:
        text = Text("", np.array(tokenizer.encode(caption)), "", {})
        batch = collate(
            [text], [image], torch.zeros(1, 2, dtype=torch.int64), cls_id=cls_id, sep_id=sep_id, limits=config.input_limits
        )
        return float(model(batch, compute).scores)

    with torch.no_grad():
        scores = [
            [[score(row[f"caption_{c}"], database[f"{row[f'image_{i}']}.npz"]) for i in (0, 1)] for c in (0, 1)]
            for row in scenes.examples
        ]
    database.close()
    return np.array(scores)


def test_twins(
    tmp_path: Path,
    scenes: Scenes,
    compute: ComputeSettings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[str] = []
    read = ImageDatabase.__getitem__
    monkeypatch.setattr(ImageDatabase, "__getitem__", lambda database, name: (reads.append(name), read(database, name))[1])
    main(scenes.options(tmp_path / "whole"))
    assert len(reads) == len(set(reads)) == 6  # 3 pairs of twins, 2 examples each
    monkeypatch.setattr(winoground, "EXAMPLES_PER_BATCH", 4)
    main(scenes.options(tmp_path / "parts"))
    assert len(reads) == 12

    expected = one_at_a_time(scenes, compute)
    right = winoground.outcomes(expected)
    assert len(expected) == 6
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        np.testing.assert_allclose([line["scores"] for line in lines], expected, atol=1e-5)
        assert [line["id"] for line in lines] == list(range(6))
        for score, values in right.items():
            assert [line[score] for line in lines] == values.tolist()
    results = json.loads((tmp_path / "whole/winoground.json").read_text())
    assert {score: results[score] for score in right} == {score: pytest.approx(v.mean()) for score, v in right.items()}
    assert results["counts"] == {"examples": 6, "image_pairs": 3, "images": 6}
    assert results["by_tag"]["collapsed_tag"]["Object"]["examples"] == 6
    origin = results["provenance"]
    assert origin["checkpoint_sha256"] == sha256(scenes.folder / "model.pt")
    assert (origin["precision"], origin["device"], origin["vocabulary"]) == ("fp32", "cpu", "bert-base-cased")
    assert origin["image_db"]["images"] == 8
    assert f"{100 * results['image']:.2f}" in capsys.readouterr().out.splitlines()[1]


def test_as_a_process_with_the_settings_of_a_training(tmp_path: Path, scenes: Scenes, compute: ComputeSettings) -> None:
    """Its boxes, and the model.json beside them."""
    run = tmp_path / "log"
    run.mkdir()
    (run / "model.json").write_bytes((scenes.folder / "model.json").read_bytes())
    (run / "hps.json").write_text(json.dumps({"max_bb": 5, "min_bb": 2, "learning_rate": 1}))
    options = scenes.options(tmp_path / "out", model_config="", train_config=run / "hps.json")
    command = [sys.executable, "scripts/eval_winoground.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    expected = one_at_a_time(scenes, compute, max_bb=5, min_bb=2)
    np.testing.assert_allclose([line["scores"] for line in lines], expected, atol=1e-5)


def database_of(folder: Path, names: list[str]) -> None:
    with ImageDatabaseWriter(folder) as database:
        for name in names:
            database.put(name, np.ones((2, 2048)), np.ones((2, 6)), np.ones(2))


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([], ""),
        (["winoground_"], ""),
        (["", "winoground_"], ""),
        (["one_", "another_"], "has no ex_0_img_0.npz (4 absent in all)"),
    ],
    ids=str,
)
def test_names_of_records(
    tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], records: list[str], complaint: str
) -> None:
    stems = [f"ex_{number}_img_{image}" for number in (0, 10) for image in (0, 1)]
    database_of(tmp_path / "db", [f"{prefix}{stem}.npz" for prefix in records or [""] for stem in stems])
    rows = [
        {"id": n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1.png", "caption_0": "a b", "caption_1": "b a"}
        for n in (0, 10)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = scenes.options(tmp_path / "out", img_db=tmp_path / "db", examples=tmp_path / "examples.jsonl")
    if complaint:
        assert complaint in fails(options, capsys, tmp_path / "out")
    else:
        main(options)
        assert json.loads((tmp_path / "out/winoground.json").read_text())["counts"]["images"] == 4


def fails(options: list[str], capsys: pytest.CaptureFixture[str], output: Path) -> str:
    """The one line with which the program ends, with exit code 2 and no output."""
    line = test_programs.fails(capsys, main, options)
    assert not output.exists()
    return line


def test_mistakes(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "examples is missing" in fails(scenes.options(out, examples=""), capsys, out)
    assert "model_config is missing" in fails(scenes.options(out, model_config=""), capsys, out)
    assert "batch_size is -1" in fails(scenes.options(out, batch_size=-1), capsys, out)
    assert "did you mean '--img_db'?" in fails([*scenes.options(out), "--img_dbs", "x"], capsys, out)
    golden = scenes.options(out, img_db=BUNDLED.image_db)
    assert "line 1: image 'scenes_" in fails(golden, capsys, out)
    other = scenes.options(out, checkpoint=BUNDLED.folder / "model.pt", model_config=BUNDLED.folder / "model.json")
    assert "width 2048, the model has img_dim 64" in fails(other, capsys, out)

    lines = [json.dumps(row) for row in scenes.examples]
    damaged = tmp_path / "examples.jsonl"
    damaged.write_text("\n".join([*lines[:3], lines[3][:-20]]))
    assert f"{damaged}: line 4: " in fails(scenes.options(out, examples=damaged), capsys, out)
    for caption in ("\u0000", "a " * 200):
        damaged.write_text("\n".join([*lines[:2], json.dumps(scenes.examples[2] | {"caption_1": caption})]))
        message = fails(scenes.options(out, examples=damaged), capsys, out)
        assert f"{damaged}: line 3: " in message
        assert "caption_1" in message

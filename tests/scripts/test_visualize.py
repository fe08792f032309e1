"""scripts/visualize.py: figures of a pair and of runs, from the files that the other programs write."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image as Picture

from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from data.tokenizer import load_tokenizer
from evaluation.plots.curves import curves_figure, running_mean
from evaluation.plots.style import short_names
from model.iais import REGULARISERS, Regulariser
from scripts import eval_isda
from scripts.visualize import main
from tests.conftest import BUNDLED
from tests.test_programs import fails
from utils.errors import InputError
from utils.logging import RunLog, read_scalars

TEXTS = TextDatabase(BUNDLED.text_db)
TEXT_ID, IMAGE = TEXTS.ids[3], TEXTS.images[TEXTS.image_of[3]]


def pair(output: Path, /, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "checkpoint": BUNDLED.folder / "model.pt", "model_config": BUNDLED.folder / "model.json", "img_db": BUNDLED.image_db,
        "txt_db": BUNDLED.text_db, "text_id": TEXT_ID, "device": "cpu", "output": output,
    }  # fmt: skip
    given = {name: value for name, value in (options | changes).items() if value is not None}
    return ["pair", *(word for name, value in given.items() for word in (f"--{name}", *str(value).split("|")))]


def svg_texts(path: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an unfinished training."""
    folder = tmp_path / "run$1"
    (folder / "log").mkdir(parents=True)
    with RunLog(folder / "log") as log:
        for update in range(1, 61):
            weight = update / 60
            log.scalars({"train/rank": 0.2 / update, "train/iais": weight * 0.3, "train/lambda": weight}, update)
        for update in (30, 60):
            log.scalars({f"val/{kind}_r{k}": k / 10 - 1 / update for kind in ("txt", "img") for k in (1, 5, 10)}, update)
    return folder


def test_a_pair_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Picture.new("RGB", (60, 40), "red").save(tmp_path / IMAGE.replace(".npz", ".png"))
    main(pair(tmp_path / "pair.png", images=tmp_path))
    assert capsys.readouterr().out == f"wrote {tmp_path / 'pair.png'}\n"
    with Picture.open(tmp_path / "pair.png") as picture:
        assert (np.asarray(picture.convert("RGB")) == [255, 0, 0]).all(axis=2).mean() > 0.02  # shows the picture

    caption = "A $5 note on a $20 note."
    main(pair(tmp_path / "pair.svg", txt_db=None, text_id=None, text=caption, image=IMAGE, show="blocks"))
    texts = svg_texts(tmp_path / "pair.svg")
    assert caption in texts
    assert texts.count(str(len(ImageDatabase(BUNDLED.image_db)[IMAGE].boxes) - 1)) == 4  # twice at VV, at LV, at VL


def test_two_models_side_by_side(tmp_path: Path) -> None:
    models = [tmp_path / name / "ckpt/model_best.pt" for name in ("before", "after")]
    for model in models:
        for file, copy in (("model.pt", model), ("model.json", model.parents[1] / "log/model.json")):
            copy.parent.mkdir(parents=True)
            shutil.copy(BUNDLED.folder / file, copy)
    both = "|".join(map(str, models))
    main(pair(tmp_path / "pair.svg", checkpoint=both, model_config=None, layer=1, head=2, show="linguistic|boxes"))
    texts = svg_texts(tmp_path / "pair.svg")
    assert {"before", "after"} <= set(texts)
    assert sum("attention of layer 1, head 2" in text for text in texts) == 2
    assert all(texts.count(piece) >= 2 for piece in load_tokenizer().tokens(TEXTS[TEXT_ID].input_ids))


def test_the_curves_of_runs(tmp_path: Path, run: Path) -> None:
    scalars = read_scalars(run / "log")
    without = {name: values for name, values in scalars.items() if name == "train/rank"}
    figure = curves_figure({"with": scalars, "without": without})
    assert len(figure.axes) == 6
    lines = {axes.get_title(loc="left"): axes.lines for axes in figure.axes}
    updates = np.arange(1, 61)
    for title, line, x, y in (
        ("ranking loss", 0, updates, 0.2 / updates),
        ("λ_t × iais_weight", 0, updates, updates / 60),
        ("IAIS loss without its weight", 0, updates, np.full(60, 0.3)),
        ("validation: image retrieval", 1, [30, 60], [0.5 - 1 / 30, 0.5 - 1 / 60]),  # R@5
    ):
        np.testing.assert_allclose(lines[title][line].get_xydata(), np.transpose([x, y]), rtol=1e-6)
    assert len(curves_figure({"without": without}).axes) == 1

    main(["run", str(run), "--output", str(tmp_path / "curves.svg")])
    assert {str(run), "ranking loss", "R@10", "λ_t × iais_weight"} <= set(svg_texts(tmp_path / "curves.svg"))


def test_running_mean() -> None:
    values = np.random.default_rng(0).random(200)
    reach = [min(i, 199 - i, 4) for i in range(200)]
    np.testing.assert_allclose(running_mean(values), [np.mean(values[i - r : i + r + 1]) for i, r in enumerate(reach)])
    assert running_mean(values[:1]) == values[:1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": "pair.jpg"}, "pair.jpg: expected a file name that ends in .png or .svg"),
        ({"text": "a dog"}, "text, or txt_db and text_id: expected one of the two"),
        ({"txt_db": None, "text_id": None, "text": "a dog"}, "image is missing"),
        ({"image": "nothing.npz"}, "nothing.npz"),
        ({"text_id": "nothing"}, "nothing"),
        ({"layer": -2}, "layer is -2, expected at least -1"),
        ({"head": 4}, "head is 4, expected 0 to 3"),
        ({"show": "boxes|block"}, "did you mean 'blocks'?"),
        ({"picture": "a.png", "images": "."}, "picture and images: both are given"),
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"images": BUNDLED.folder}, f"'{IMAGE}'"),
        ({"model_config": None}, "model_config is missing, and"),
        ({"checkpoint": "|".join([str(BUNDLED.folder / "model.pt")] * 2)}, "is given twice"),
    ],
    ids=str,
)
def test_pair_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], expected: str) -> None:
    assert expected in fails(capsys, main, pair(tmp_path / "pair.png", **changes))
    assert not list(tmp_path.iterdir())


def test_mistakes_with_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    output = tmp_path / "curves.png"
    assert "expected the log folder" in fails(capsys, main, ["run", str(tmp_path), "--output", str(output)])
    assert "is given twice" in fails(capsys, main, ["run", str(run), f"{run}/", "--output", str(output)])
    with RunLog(tmp_path):
        pass
    with pytest.raises(InputError, match="new: nothing recorded yet"):
        curves_figure({"new": read_scalars(tmp_path)})
    assert not output.exists()


@pytest.mark.parametrize(
    ("paths", "expected"),
    [("a/start/ckpt/m.pt a/tuned/ckpt/m.pt", "start tuned"), ("a/x/1 a/y/2", "x/1 y/2"), ("a a/b", "a a/b"), ("a/b", "a/b")],
)
def test_short_names(paths: str, expected: str) -> None:
    assert short_names(paths.split()) == expected.split()


@pytest.mark.parametrize("program", ["pair", "isda"])
def test_a_wrong_regulariser_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setitem(REGULARISERS, "wrong", Regulariser("wrong", lambda _: 1 / 0, alignment=False))
    words = pair(tmp_path / "pair.png")
    if program == "isda":
        words = [*pair(tmp_path / "out", text_id=None)[1:-2], "--output_dir", str(tmp_path / "out")]
    line = fails(capsys, main if program == "pair" else eval_isda.main, words)
    assert "regulariser wrong in tests.scripts.test_visualize failed: ZeroDivisionError: division by zero" in line
    assert not list(tmp_path.iterdir())

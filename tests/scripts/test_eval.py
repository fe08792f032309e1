"""eval_isda.py and eval_winoground.py on drawn scenes, against scoring pair by pair, and their errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.boxes import BoxRule
from data.image_db import ImageDatabase, ImageDatabaseWriter
from data.loader import Loader
from data.sources.entities import read_annotated
from data.split import RetrievalSplit
from evaluation import winoground
from evaluation.alignment import alignment_of_positives
from evaluation.isda import find_objects, measure_isda, record_names, with_uniform_attention
from evaluation.retriever import Retriever
from examples.scenes.dataset import Recipe, make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from scripts import convert_imgdir, create_txtdb, eval_isda, eval_winoground
from tests.conftest import BUNDLED
from tests.processes import ROOT
from tests.test_programs import fails
from utils.distributed import SingleProcess
from utils.files import sha256

HEADS, TEST_IMAGES = 4, 6
TEST_PICTURES = [f"scenes_{number:012d}" for number in range(2, 2 + TEST_IMAGES)]


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

    def isda(self, output: Path, **changes: object) -> list[str]:
        """Options of ``eval_isda.py``."""
        given = {"entities": self.folder / "scenes/entities", "txt_db": self.folder / "itm_test.db"}
        return self.options(output, **given | changes)

    def winoground(self, output: Path, **changes: object) -> list[str]:
        """Options of ``eval_winoground.py``."""
        return self.options(output, **{"examples": self.folder / "scenes/winoground/examples.jsonl"} | changes)

    def retriever(self) -> Retriever:
        return Retriever.from_checkpoint(self.folder / "model.pt", self.folder / "model.json", device="cpu")


@pytest.fixture(scope="module")
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


@pytest.fixture
def entities(tmp_path: Path, scenes: Scenes) -> Path:
    """A copy of the annotation, to be changed."""
    return Path(shutil.copytree(scenes.folder / "scenes/entities", tmp_path / "entities"))


def results(scenes: Scenes, output: Path, *flags: str, **changes: object) -> Any:
    eval_isda.main([*scenes.isda(output, **changes), *flags])
    return json.loads((output / "isda.json").read_text())


def isda_one_by_one(scenes: Scenes) -> tuple[dict[tuple[int | str, int | None], float], Counter[str]]:
    """Mean ISDa by (layer, head), with head None for the mean of heads and layer "even" for uniform attention; counts."""
    retriever, database = scenes.retriever(), ImageDatabase(scenes.folder / "db")
    measured = defaultdict[tuple[int | str, int | None], list[float]](list)
    counts: Counter[str] = Counter()
    for picture in TEST_PICTURES:
        annotated, image = read_annotated(scenes.folder / "scenes/entities", picture), database[f"{picture}.npz"]
        for caption in annotated.captions:
            objects = find_objects(caption, annotated, image, retriever.tokenizer, counts)
            counts["objects"] += len(objects.pieces)
            counts["shared"] += objects.regions.sum(axis=0).max() > 1
            attention = retriever.attention(" ".join(caption.words), image)
            pairs = {(layer, head): attention.pair(layer, head) for layer in (0, 1) for head in (None, *range(HEADS))}
            for key, pair in {**pairs, ("even", None): with_uniform_attention(pairs[0, None])}.items():
                measured[key].append(measure_isda(pair, objects)["isda"])
    database.close()
    return {key: np.mean(values) for key, values in measured.items()}, counts


def test_one_split_in_all_layers_and_heads(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    measured = results(scenes, tmp_path / "out", "--heads", layers="all")
    counts, skipped = measured["counts"], measured["counts"]["skipped"]
    assert (counts["pairs"], counts["images"]) == (5 * TEST_IMAGES, TEST_IMAGES)
    assert skipped["images"] == {"not_in_img_db": 0, "not_in_txt_db": 2, "no_annotation": 0}
    assert skipped["captions"] == {"too_long": 0, "fewer_than_2_objects": 0}
    expected, counted = isda_one_by_one(scenes)
    assert (counts["objects"], skipped["chains"]["scene"]) == (counted["objects"], counted["scene"])
    assert counts["pairs_with_shared_regions"] == counted["shared"]
    assert min(counted.values()) > 0
    found = {("even", None): measured["even_attention"]["isda"]}
    for entry in measured["layers"]:
        found |= {(entry["layer"], of_head.get("head")): of_head["isda"] for of_head in (entry, *entry["heads"])}
        low, high = entry["interval_95"]["isda"]
        assert low < entry["isda"] < high
    assert found == pytest.approx(expected, rel=1e-4)
    assert measured["provenance"]["checkpoint_sha256"] == sha256(scenes.folder / "model.pt")
    assert f"{measured['layers'][1]['isda']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "out/isda.png").read_bytes().startswith(b"\x89PNG")
    assert "isda.json: already exists" in fails(capsys, eval_isda.main, scenes.isda(tmp_path / "out"))


def test_published_names(tmp_path: Path, scenes: Scenes, entities: Path) -> None:
    """Pictures with numbers for names are looked up as in the databases of Flickr30k; last layer, all pictures."""
    stored = ImageDatabase(scenes.folder / "db")
    with ImageDatabaseWriter(tmp_path / "db") as writer:
        for number, name in enumerate(TEST_PICTURES, start=9000):
            image = stored[f"{name}.npz"]
            writer.put(f"flickr30k_{number:012d}.npz", image.features, image.boxes[:, :6], np.ones(len(image.boxes)))
            (entities / f"Sentences/{name}.txt").rename(entities / f"Sentences/{number}.txt")
            (entities / f"Annotations/{name}.xml").rename(entities / f"Annotations/{number}.xml")
    stored.close()
    measured = results(scenes, tmp_path / "out", txt_db="", img_db=tmp_path / "db", entities=entities, plot="svg")
    assert measured["layers"] == results(scenes, tmp_path / "expected")["layers"]
    assert [entry["layer"] for entry in measured["layers"]] == [1]
    assert measured["counts"]["skipped"]["images"] == {"not_in_img_db": 2, "not_in_txt_db": 0, "no_annotation": 0}
    assert b"<svg" in (tmp_path / "out/isda.svg").read_bytes()
    assert record_names("1000092795") == ["1000092795.npz", "flickr30k_001000092795.npz"]
    assert record_names("scenes_000000000012") == ["scenes_000000000012.npz"]


def test_without_annotation_it_is_the_alignment_losses(tmp_path: Path, scenes: Scenes) -> None:
    measured = results(scenes, tmp_path / "out", entities="", layers="all")
    assert measured["counts"] == {"pairs": 5 * TEST_IMAGES, "images": TEST_IMAGES}
    retriever = scenes.retriever()
    paths = str(scenes.folder / "itm_test.db"), str(scenes.folder / "db")
    with RetrievalSplit(*paths, retriever.config.input_limits) as split:
        loader = Loader(torch.device("cpu"))
        losses = alignment_of_positives(retriever.model, split, retriever.compute, loader, SingleProcess())
    first, last = measured["layers"]
    for name, by_modality in losses.items():
        for modality, value in by_modality.items():
            assert last[f"{name}_{modality}"] == pytest.approx(value, rel=1e-4)
            assert measured["even_attention"][f"{name}_{modality}"] == pytest.approx(0, abs=1e-4)
    assert first["singular_L"] != pytest.approx(last["singular_L"], rel=1e-3)


def test_what_is_skipped(tmp_path: Path, scenes: Scenes, entities: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = TEST_PICTURES[:3]
    (entities / f"Sentences/{first}.txt").unlink()
    (entities / f"Annotations/{first}.xml").unlink()
    sentences = entities / f"Sentences/{second}.txt"
    kept = sentences.read_text().splitlines()[0]
    sentences.write_text(f"{kept}\n{kept.split(']')[0]}]\n{kept} {'long ' * 200}\nno phrase\n")
    counts = results(scenes, tmp_path / "out", entities=entities)["counts"]
    assert counts["pairs"] == 1 + 5 * (TEST_IMAGES - 2)
    assert counts["skipped"]["images"] == {"not_in_img_db": 0, "not_in_txt_db": 2, "no_annotation": 1}
    assert counts["skipped"]["captions"] == {"too_long": 1, "fewer_than_2_objects": 2}

    def message(**changes: object) -> str:
        return fails(capsys, eval_isda.main, scenes.isda(tmp_path / "new", entities=entities, **changes))

    annotation = entities / f"Annotations/{third}.xml"
    whole = annotation.read_text()
    annotation.write_text(whole.replace("</annotation>", ""))
    assert f"{annotation}: line {len(whole.splitlines())}: not XML" in message()
    annotation.write_text(whole)
    for path in (entities / "Sentences").iterdir():
        path.write_text("no phrase\n")
    assert "no caption with 2 objects to measure" in message()
    for name in ("1", "01"):
        (entities / f"Sentences/{name}.txt").write_text("a dog\n")
    with ImageDatabaseWriter(tmp_path / "db") as database:
        database.put("flickr30k_000000000001.npz", np.ones((2, 2048)), np.ones((2, 6)), np.ones(2))
    assert "'01' and '1' are both image 'flickr30k_000000000001.npz'" in message(txt_db="", img_db=tmp_path / "db")
    assert not (tmp_path / "new").exists()


def saved_scores(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]


def scores_one_by_one(scenes: Scenes, **boxes: Any) -> np.ndarray:
    """(E, 2, 2): the scores of all examples, each pair in a separate batch."""
    retriever, database = scenes.retriever(), ImageDatabase(scenes.folder / "db", BoxRule(**boxes))

    def score(row: dict[str, str], caption: int, image: int) -> float:
        return retriever.score([row[f"caption_{caption}"]], [database[row[f"image_{image}"] + ".npz"]]).item()

    scores = [[[score(row, caption, image) for image in (0, 1)] for caption in (0, 1)] for row in scenes.examples]
    database.close()
    return np.array(scores)


def test_twins(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = ImageDatabase.__getitem__
    monkeypatch.setattr(ImageDatabase, "__getitem__", lambda database, name: (reads.append(name), read(database, name))[1])
    eval_winoground.main(scenes.winoground(tmp_path / "whole"))
    assert len(reads) == len(set(reads)) == TEST_IMAGES
    monkeypatch.setattr(winoground, "EXAMPLES_PER_BATCH", 4)
    eval_winoground.main(scenes.winoground(tmp_path / "parts"))
    assert len(reads) == 2 * TEST_IMAGES

    expected = scores_one_by_one(scenes)
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
    assert "winoground.json: already exists" in fails(capsys, eval_winoground.main, scenes.winoground(tmp_path / "whole"))


def test_as_a_process_with_the_settings_of_a_training(tmp_path: Path, scenes: Scenes) -> None:
    """Its boxes, and the model.json beside them."""
    (tmp_path / "model.json").write_bytes((scenes.folder / "model.json").read_bytes())
    (tmp_path / "hps.json").write_text(json.dumps({"max_bb": 5, "min_bb": 2, "learning_rate": 1}))
    words = scenes.winoground(tmp_path / "out", model_config="", train_config=tmp_path / "hps.json")
    subprocess.run([sys.executable, "scripts/eval_winoground.py", *words], cwd=ROOT, check=True, capture_output=True)
    expected = scores_one_by_one(scenes, max_bb=5, min_bb=2)
    np.testing.assert_allclose([line["scores"] for line in saved_scores(tmp_path / "out")], expected, atol=1e-5)


def test_captions_that_cannot_be_scored(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "examples.jsonl"
    for caption, message in (("\u0000", "no word pieces"), ("a " * 200, "200 word pieces, expected at most")):
        rows = [*scenes.examples[:2], scenes.examples[2] | {"caption_1": caption}]
        path.write_text("\n".join(map(json.dumps, rows)))
        line = fails(capsys, eval_winoground.main, scenes.winoground(tmp_path / "out", examples=path))
        assert f"{path}: line 3: caption_1: " in line
        assert message in line


GOLDEN_MODEL = {"checkpoint": BUNDLED.folder / "model.pt", "model_config": BUNDLED.folder / "model.json"}


@pytest.mark.parametrize(
    ("program", "changes", "message"),
    [
        ("isda", {"txt_db": "", "entities": ""}, "entities and txt_db are missing"),
        ("isda", {"layers": 2}, "layers names layer 2"),
        ("isda", {"layers": "last"}, "--layers: "),
        ("isda", {"plot": "pdf"}, "one of png, svg"),
        ("isda", {"entities": BUNDLED.folder}, "Sentences: cannot be read"),
        ("isda", {"txt_db": "", "img_db": BUNDLED.image_db}, "'not_in_img_db': 8"),
        ("winoground", {"examples": ""}, "examples is missing"),
        ("winoground", {"batch_size": -1}, "batch_size is -1"),
        ("winoground", {"img_db": BUNDLED.image_db}, "line 1: image 'scenes_"),
        ("winoground", GOLDEN_MODEL, "width 2048, the model has img_dim 64"),
    ],
    ids=str,
)
def test_one_line_errors(
    tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], program: str, changes: dict[str, Any], message: str
) -> None:
    main, options = {"isda": (eval_isda.main, scenes.isda), "winoground": (eval_winoground.main, scenes.winoground)}[program]
    assert message in fails(capsys, main, options(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("main", "step"), [(eval_isda.main, "measure"), (eval_winoground.main, "winoground.score_examples")])
def test_a_signal_leaves_nothing(
    tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, main: Any, step: str
) -> None:
    monkeypatch.setattr(f"{main.__module__}.{step}", lambda *_: signal.raise_signal(signal.SIGTERM))
    options = scenes.isda if step == "measure" else scenes.winoground
    with pytest.raises(SystemExit, match="143"):
        main(options(tmp_path / "out"))
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""The program on drawn scenes against measuring pair by pair, and its errors."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.image_db import ImageDatabase, ImageDatabaseWriter
from data.loader import Loader
from data.sources.entities import read_annotated
from data.split import RetrievalSplit
from evaluation.alignment import alignment_of_positives
from evaluation.isda import evened, find_objects, measure_isda, record_names
from evaluation.retriever import Retriever
from scripts.eval_isda import main
from tests.conftest import BUNDLED
from tests.scripts.conftest import TEST_IMAGES, Scenes
from tests.test_programs import fails
from utils.distributed import SingleProcess
from utils.files import sha256

HEADS = 4
TEST_PICTURES = [f"scenes_{number:012d}" for number in range(2, 2 + TEST_IMAGES)]


def options(scenes: Scenes, output: Path, **changes: object) -> list[str]:
    given = {"entities": scenes.folder / "scenes/entities", "txt_db": scenes.folder / "itm_test.db"}
    return scenes.options(output, **given | changes)


def results(scenes: Scenes, output: Path, *flags: str, **changes: object) -> Any:
    main([*options(scenes, output, **changes), *flags])
    return json.loads((output / "isda.json").read_text())


@pytest.fixture
def entities(tmp_path: Path, scenes: Scenes) -> Path:
    """A copy of the annotation, to be changed."""
    return Path(shutil.copytree(scenes.folder / "scenes/entities", tmp_path / "entities"))


def retriever_of(scenes: Scenes) -> Retriever:
    return Retriever.from_checkpoint(scenes.folder / "model.pt", scenes.folder / "model.json", device="cpu")


def one_by_one(scenes: Scenes) -> tuple[dict[tuple[int | str, int | None], float], Counter[str]]:
    """Mean ISDa by (layer, head), with head None for the mean of heads and layer "even" for uniform attention; counts."""
    retriever, database = retriever_of(scenes), ImageDatabase(scenes.folder / "db")
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
            for key, pair in {**pairs, ("even", None): evened(pairs[0, None])}.items():
                measured[key].append(measure_isda(pair, objects)["isda"])
    database.close()
    return {key: np.mean(values) for key, values in measured.items()}, counts


def test_one_split_in_all_layers_and_heads(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    measured = results(scenes, tmp_path / "out", "--heads", layers="all")
    counts, skipped = measured["counts"], measured["counts"]["skipped"]
    assert (counts["pairs"], counts["images"]) == (5 * TEST_IMAGES, TEST_IMAGES)
    assert skipped["images"] == {"not_in_img_db": 0, "not_in_txt_db": 2, "no_annotation": 0}
    assert skipped["captions"] == {"too_long": 0, "fewer_than_2_objects": 0}
    expected, counted = one_by_one(scenes)
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
    assert "isda.json: already exists" in fails(capsys, main, options(scenes, tmp_path / "out"))


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
    retriever = retriever_of(scenes)
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
        return fails(capsys, main, options(scenes, tmp_path / "new", entities=entities, **changes))

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"txt_db": "", "entities": ""}, "entities and txt_db are missing"),
        ({"layers": 2}, "layers names layer 2"),
        ({"layers": "last"}, "--layers: "),
        ({"plot": "pdf"}, "one of png, svg"),
        ({"entities": BUNDLED.folder}, "Sentences: cannot be read"),
        ({"txt_db": "", "img_db": BUNDLED.image_db}, "'not_in_img_db': 8"),
    ],
    ids=str,
)
def test_one_line_errors(
    tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in fails(capsys, main, options(scenes, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()

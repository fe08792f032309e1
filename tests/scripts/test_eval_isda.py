"""The program on drawn scenes against plain loops, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
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
from evaluation.retriever import Retriever
from examples.scenes.dataset import Recipe
from examples.scenes.files import make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from scripts import convert_imgdir, create_txtdb
from scripts.eval_isda import main, record_names
from tests import test_programs
from tests.conftest import BUNDLED
from tests.evaluation.test_isda import naive_isda
from utils.distributed import connect
from utils.files import sha256

ROOT = Path(__file__).resolve().parent.parent.parent
TEST = 4  # images of the test split


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes, their databases and a random model."""

    folder: Path

    def options(self, output: Path, *flags: str, **changes: object) -> list[str]:
        given: dict[str, object] = {
            "entities": self.folder / "scenes/entities", "txt_db": self.folder / "itm_test.db", "img_db": self.folder / "db",
            "checkpoint": self.folder / "model.pt", "model_config": self.folder / "model.json",
            "output_dir": output, "device": "cpu",
        }  # fmt: skip
        return [*(word for name, value in (given | changes).items() if value for word in (f"--{name}", str(value))), *flags]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("isda")
    make_scenes(folder / "scenes", {"train": 1, "val": 1, "test": TEST}, Recipe(seed=1), 1)
    convert_imgdir.main(["--img_dir", str(folder / "scenes/features"), "--output", str(folder / "db"), "--nproc", "1"])
    annotations = str(folder / "scenes/dataset_scenes.json")
    create_txtdb.main(
        ["--annotations", annotations, "--split", "test", "--output", str(folder / "itm_test.db"), "--nproc", "1"]
    )
    torch.manual_seed(0)
    (folder / "model.json").write_bytes((ROOT / "config/uniter-tiny.json").read_bytes())
    save_checkpoint(folder / "model.pt", RetrievalModel(UniterConfig.from_json(folder / "model.json")).state_dict())
    return Scenes(folder)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared)


def softmaxed(scores: np.ndarray) -> np.ndarray:
    """The mean over heads of the softmax of each row: (A, C, C) to (C, C)."""
    shares = np.exp(scores.astype(np.float64))
    mean: np.ndarray = (shares / shares.sum(axis=2, keepdims=True)).mean(axis=0)
    return mean


def by_plain_loops(scenes: Scenes, pictures: list[str]) -> tuple[dict[tuple[int | str, int | None], list[float]], Counter[str]]:
    """ISDa of every caption by (layer, head), None for the mean of the heads, and of even attention; and what there was."""
    retriever = Retriever.from_checkpoint(scenes.folder / "model.pt", scenes.folder / "model.json", device="cpu")
    database = ImageDatabase(scenes.folder / "db")
    found: dict[tuple[int | str, int | None], list[float]] = {}
    counts: Counter[str] = Counter()
    for picture in pictures:
        annotated, image = read_annotated(scenes.folder / "scenes/entities", picture), database[f"{picture}.npz"]
        for caption in annotated.captions:
            pieces: dict[int, set[int]] = {}
            length = 0
            for place, word in enumerate(caption.words):
                numbers = range(length, length := length + len(retriever.tokenizer.encode(word)))
                for phrase in caption.phrases:
                    if place in phrase.words:
                        pieces.setdefault(phrase.chain, set()).update(numbers)
            counts["scene"] += len(pieces.keys() & annotated.scenes)
            regions: dict[int, set[int]] = {}
            for chain in pieces.keys() & annotated.boxes.keys():
                shares = [
                    max(iou(region, box) for box in annotated.boxes[chain].tolist()) for region in image.boxes[:, :4].tolist()
                ]
                best = max(shares)
                near = {shares.index(best)} if best >= 0.3 else set()
                regions[chain] = {k for k, share in enumerate(shares) if share >= 0.5} or near
            chains = [chain for chain in pieces if regions.get(chain)]
            assert len(chains) >= 2
            counts["pairs"] += 1
            counts["objects"] += len(chains)
            every = [k for chain in chains for k in regions[chain]]
            counts["shared"] += len(every) > len(set(every))
            attention = retriever.attention(" ".join(caption.words), image)
            alike = torch.zeros_like(attention.maps[0][:1])
            for layer, scores in [*attention.maps.items(), ("even", alike)]:
                words, seen = slice(1, length + 1), slice(length + 2, None)
                for head, of_heads in {None: scores.numpy(), **dict(enumerate(scores.numpy()[:, None]))}.items():
                    value = naive_isda(
                        softmaxed(of_heads[:, words, words]),
                        softmaxed(of_heads[:, seen, seen]),
                        [pieces[chain] for chain in chains],
                        [regions[chain] for chain in chains],
                    )
                    found.setdefault((layer, head), []).append(value)
    database.close()
    return found, counts


def results(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "isda.json").read_text())
    return parsed


def test_one_split_in_all_layers_and_heads(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    main(scenes.options(tmp_path / "out", "--heads", layers="all"))
    pictures = [f"scenes_{number:012d}" for number in range(2, 2 + TEST)]
    measured = results(tmp_path / "out")
    counts = measured["counts"]
    assert (counts["pairs"], counts["images"]) == (5 * TEST, TEST)
    assert counts["skipped"]["images"] == {"not_in_img_db": 0, "not_in_txt_db": 2, "no_annotation": 0}
    assert counts["skipped"]["captions"] == {"too_long": 0, "fewer_than_2_objects": 0}
    expected, found = by_plain_loops(scenes, pictures)
    assert counts["objects"] == found["objects"]
    assert counts["pairs_with_shared_regions"] == found["shared"] > 0
    assert counts["skipped"]["chains"]["scene"] == found["scene"] > 0
    assert [entry["layer"] for entry in measured["layers"]] == [0, 1]
    for entry in measured["layers"]:
        assert entry["isda"] == pytest.approx(np.mean(expected[entry["layer"], None]), rel=1e-4)
        low, high = entry["interval_95"]["isda"]
        assert low < entry["isda"] < high
        for head, of_head in enumerate(entry["heads"]):
            assert of_head["head"] == head
            assert of_head["isda"] == pytest.approx(np.mean(expected[entry["layer"], head]), rel=1e-4)
    assert measured["even_attention"]["isda"] == pytest.approx(np.mean(expected["even", None]), rel=1e-4)
    assert measured["provenance"]["checkpoint_sha256"] == sha256(scenes.folder / "model.pt")
    assert f"{measured['layers'][1]['isda']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "out/isda.png").read_bytes().startswith(b"\x89PNG")


def test_published_names(tmp_path: Path, scenes: Scenes) -> None:
    """Pictures that are called by a number are looked up as in the databases of Flickr30k; the last layer, all pictures."""
    stored = ImageDatabase(scenes.folder / "db")
    entities = tmp_path / "entities"
    shutil.copytree(scenes.folder / "scenes/entities", entities)
    with ImageDatabaseWriter(tmp_path / "db") as writer:
        for number in range(TEST):
            name = f"scenes_{2 + number:012d}"
            image = stored[f"{name}.npz"]
            writer.put(f"flickr30k_{9000 + number:012d}.npz", image.features, image.boxes[:, :6], np.ones(len(image.boxes)))
            (entities / f"Sentences/{name}.txt").rename(entities / f"Sentences/{9000 + number}.txt")
            (entities / f"Annotations/{name}.xml").rename(entities / f"Annotations/{9000 + number}.xml")
    stored.close()
    options = scenes.options(tmp_path / "out", txt_db="", img_db=tmp_path / "db", entities=entities, plot="svg")
    main(options)
    measured = results(tmp_path / "out")
    main(scenes.options(tmp_path / "expected"))
    expected = results(tmp_path / "expected")
    assert measured["layers"] == expected["layers"]
    assert [entry["layer"] for entry in measured["layers"]] == [1]
    assert measured["counts"]["skipped"]["images"] == {"not_in_img_db": 2, "not_in_txt_db": 0, "no_annotation": 0}
    assert b"<svg" in (tmp_path / "out/isda.svg").read_bytes()


def test_without_annotation_it_is_the_alignment_losses(tmp_path: Path, scenes: Scenes) -> None:
    main(scenes.options(tmp_path / "out", entities="", layers="all"))
    measured = results(tmp_path / "out")
    assert measured["counts"] == {"pairs": 5 * TEST, "images": TEST}
    retriever = Retriever.from_checkpoint(scenes.folder / "model.pt", scenes.folder / "model.json", device="cpu")
    with (
        connect() as group,
        RetrievalSplit(str(scenes.folder / "itm_test.db"), str(scenes.folder / "db"), retriever.config.input_limits) as source,
    ):
        losses = alignment_of_positives(retriever.model, source, retriever.compute, Loader(torch.device("cpu")), group)
    for name, by_way in losses.items():
        for way, value in by_way.items():
            assert measured["layers"][-1][f"{name}_{way}"] == pytest.approx(value, rel=1e-4)
    assert measured["even_attention"] == {
        name: pytest.approx(0, abs=1e-4) if name != "interval_95" else value
        for name, value in measured["even_attention"].items()
    }
    assert measured["layers"][0]["singular_L"] != pytest.approx(measured["layers"][1]["singular_L"], rel=1e-3)


def test_what_is_left_out(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    entities = tmp_path / "entities"
    shutil.copytree(scenes.folder / "scenes/entities", entities)
    first, second, third = (f"scenes_{number:012d}" for number in range(2, 5))
    for folder, suffix in (("Sentences", "txt"), ("Annotations", "xml")):
        (entities / f"{folder}/{first}.{suffix}").unlink()
    kept = (entities / f"Sentences/{second}.txt").read_text().splitlines()[0]
    one_object = " ".join(kept.split("]")[0].split()) + "]"
    (entities / f"Sentences/{second}.txt").write_text(f"{kept}\n{one_object}\n{kept} {'long ' * 200}\nno phrase\n")
    main(scenes.options(tmp_path / "out", entities=entities))
    counts = results(tmp_path / "out")["counts"]
    assert counts["pairs"] == 1 + 5 * (TEST - 2)
    assert counts["skipped"]["images"] == {"not_in_img_db": 0, "not_in_txt_db": 2, "no_annotation": 1}
    assert counts["skipped"]["captions"] == {"too_long": 1, "fewer_than_2_objects": 2}

    annotation = entities / f"Annotations/{third}.xml"
    whole = annotation.read_text()
    annotation.write_text(whole.replace("</annotation>", ""))
    message = fails(scenes.options(tmp_path / "new", entities=entities), capsys, tmp_path / "new")
    assert f"{annotation}: line {len(whole.splitlines())}: not XML" in message
    for path in (entities / "Sentences").iterdir():
        path.write_text("no phrase\n")
    annotation.write_text(whole)
    message = fails(scenes.options(tmp_path / "new", entities=entities), capsys, tmp_path / "new")
    assert "no caption with 2 objects to measure" in message


def test_names_of_records() -> None:
    assert record_names("scenes_000000000012") == ["scenes_000000000012.npz"]
    assert record_names("1000092795") == ["1000092795.npz", "flickr30k_001000092795.npz"]


def fails(options: list[str], capsys: pytest.CaptureFixture[str], output: Path) -> str:
    """The one line with which the program ends, with exit code 2 and no output."""
    line = test_programs.fails(capsys, main, options)
    assert not output.exists()
    return line


def test_mistakes(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "entities and txt_db are missing" in fails(scenes.options(out, txt_db="", entities=""), capsys, out)
    assert "model_config is missing" in fails(scenes.options(out, model_config=""), capsys, out)
    assert "layers names layer 2" in fails(scenes.options(out, layers=2), capsys, out)
    assert "--layers: " in fails(scenes.options(out, layers="last"), capsys, out)
    assert "one of png, svg" in fails(scenes.options(out, plot="pdf"), capsys, out)
    assert "Sentences: cannot be read" in fails(scenes.options(out, entities=tmp_path), capsys, out)
    other = scenes.options(out, txt_db="", img_db=BUNDLED.image_db)
    assert "'not_in_img_db': 6" in fails(other, capsys, out)
    shutil.copytree(scenes.folder / "scenes/entities", tmp_path / "entities")
    for folder in ("Sentences", "Annotations"):
        for name in ("1", "01"):
            (tmp_path / f"entities/{folder}/{name}.txt").write_text("a dog\n")
    with ImageDatabaseWriter(tmp_path / "db") as database:
        database.put("flickr30k_000000000001.npz", np.ones((2, 2048)), np.ones((2, 6)), np.ones(2))
    twice = scenes.options(out, txt_db="", img_db=tmp_path / "db", entities=tmp_path / "entities")
    assert "'01' and '1' would both be image 'flickr30k_000000000001.npz'" in fails(twice, capsys, out)

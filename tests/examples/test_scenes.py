"""The drawn scenes: true captions, twins that differ in two positions, readable files, features that tell items apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data.sources.entities import read_annotated
from evaluation.ablation.grid import Grid, planned
from evaluation.isda import iou
from examples.scenes.dataset import SPLITS, Recipe, plan, scene_of
from examples.scenes.scene import COLOURS, HEIGHT, SHAPES, SIZES, WIDTH, Box, Item
from optim.options import TrainOptions
from scripts.make_scenes import main
from tests import naive
from tests.processes import ROOT
from tests.test_programs import fails
from utils.options import read_json_as


class Scenes(NamedTuple):
    """A dataset that ``make_scenes`` wrote: its entries in Karpathy's JSON, and what is in each picture."""

    folder: Path
    recipe: Recipe
    counts: dict[str, int]
    images: dict[str, dict[str, Any]]  # by stem
    things: dict[str, tuple[Item, ...]]  # by stem

    def captions(self, stem: str) -> list[str]:
        return [sentence["raw"] for sentence in self.images[stem]["sentences"]]

    def twins(self) -> dict[str, str]:
        twins = json.loads((self.folder / "twins.json").read_text())
        return {Path(name).stem: Path(other).stem for name, (other,) in twins.items()}


def make(folder: Path, recipe: Recipe, workers: int, *counts: int) -> Scenes:
    by_split = dict(zip(SPLITS, counts, strict=True))
    options = {"seed": recipe.seed, "twins": recipe.twins, "relations": recipe.relations, "workers": workers, **by_split}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    main(["--output", str(folder / "out"), *words, "--items", *map(str, recipe.items)])
    images = json.loads((folder / "out/dataset_scenes.json").read_text())["images"]
    things = {job.stem: scene_of(job, recipe).items for job in plan(by_split, recipe)}
    return Scenes(folder / "out", recipe, by_split, {Path(image["filename"]).stem: image for image in images}, things)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return make(tmp_path_factory.mktemp("mixed"), Recipe(3, twins=0.2), 2, 150, 4, 60)


@pytest.fixture(scope="module", params=["mixed", "relations"])
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mixed: Scenes) -> Scenes:
    if request.param == "mixed":
        return mixed
    return make(tmp_path_factory.mktemp("relations"), Recipe(5, twins=1.0, items=(2, 4), relations=5), 1, 40, 2, 8)


NOUN = rf"an? (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
SIDE = r"(?:to|on) the (left|right) of|(above|higher)(?: than)?|(below|lower)(?: than)?"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def lies(side: str, a: Box, b: Box) -> bool:
    return {"left": a[2] < b[0], "right": a[0] > b[2], "above": a[3] < b[1], "below": a[1] > b[3]}[side]


def is_true(caption: str, things: tuple[Item, ...]) -> bool:
    """Read a caption independently of the code that wrote it; fail if it makes no readable claim."""
    text = caption.lower()
    nouns = [noun.groups() for noun in re.finditer(NOUN, text)]
    assert len(nouns) >= 2, caption
    found = [[t.box for t in things if (t.colour, t.shape) == noun[1:] and noun[0] in (None, t.size)] for noun in nouns]
    assert all(len(boxes) <= 1 for boxes in found), f"{caption}: ambiguous"
    if not all(found):
        return False
    sides = [next(filter(None, match.groups())) for match in re.finditer(SIDE, text)]
    for side, (box,) in zip(sides, found[1:], strict=False):
        if not lies({"higher": "above", "lower": "below"}.get(side, side), found[0][0], box):
            return False
    count = re.search(rf"\b({'|'.join(NUMBERS)}) (shape|{'|'.join(SHAPES)})(?:s|es)\b", text)
    assert sides or count or len(nouns) == 3, caption
    return not count or NUMBERS[count[1]] == sum(count[2] in ("shape", thing.shape) for thing in things)


def test_items_do_not_overlap_and_stay_inside(scenes: Scenes) -> None:
    assert {len(things) for things in scenes.things.values()} == set(range(scenes.recipe.items[0], scenes.recipe.items[1] + 1))
    for stem, things in scenes.things.items():
        for x1, y1, x2, y2 in (thing.box for thing in things):
            assert 0 < x1 < x2 < WIDTH, stem
            assert 0 < y1 < y2 < HEIGHT, stem
        for a, b in combinations(things, 2):
            assert any(lies(side, a.box, b.box) for side in ("left", "right", "above", "below")), stem


def test_captions_are_true_varied_and_of_moderate_length(scenes: Scenes) -> None:
    claims: Counter[str] = Counter()
    for stem, things in scenes.things.items():
        captions = scenes.captions(stem)
        assert len(set(captions)) == 5
        for caption in captions:
            assert is_true(caption, things), (stem, caption)
            assert 6 <= len(caption.split()) <= 25, caption
            assert re.fullmatch(r"[A-Z][a-z]*([ ,]+[a-z]+)*\.", caption), caption
            claims.update(caption.split())
    expected = ["left", "right", "above", "below", *(["two", "four", "together"] if scenes.recipe.relations < 5 else [])]
    assert min(claims[word] for word in expected) > 10


def test_a_caption_identifies_its_image(mixed: Scenes) -> None:
    stems = [stem for stem, image in mixed.images.items() if image["split"] == "test"]
    fitting = [
        sum(is_true(caption, mixed.things[other]) for other in stems) for stem in stems for caption in mixed.captions(stem)
    ]
    assert np.median(fitting) == 1
    assert np.mean(fitting) < 1.2


def test_twins_differ_in_two_positions_and_the_order_of_words(scenes: Scenes) -> None:
    """Captions that relate two items consist of the same words as the twin's, letter case included, and are false of it."""
    twins = scenes.twins()
    for split, count in scenes.counts.items():
        assert sum(scenes.images[stem]["split"] == split for stem in twins) == 2 * round(count * scenes.recipe.twins / 2)
    for stem, twin in twins.items():
        assert twins[twin] == stem
        assert scenes.images[stem]["split"] == scenes.images[twin]["split"]
        here, there = scenes.things[stem], scenes.things[twin]
        assert [replace(thing, centre=(0, 0)) for thing in here] == [replace(thing, centre=(0, 0)) for thing in there]
        assert sum(a.box != b.box for a, b in zip(here, there, strict=True)) == 2
        for number in range(scenes.recipe.relations):
            own, other = scenes.captions(stem)[number], scenes.captions(twin)[number]
            assert sorted(own.split()) == sorted(other.split())
            assert [is_true(own, here), is_true(own, there)] == [True, False]


def test_winoground_examples_are_the_twins_of_the_test_split(scenes: Scenes) -> None:
    lines = (scenes.folder / "winoground/examples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * round(scenes.counts["test"] * scenes.recipe.twins / 2)  # two captions per pair
    for number, example in enumerate(map(json.loads, lines)):
        one, other = example["image_0"], example["image_1"]
        assert scenes.images[one]["split"] == "test"
        assert scenes.twins()[one] == other
        captions = {f"caption_{side}": scenes.captions(stem)[number % 2] for side, stem in enumerate((one, other))}
        tags = {"tag": "Noun Phrase", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
        assert example == {"id": number, "image_0": one, "image_1": other, **captions, **tags}


def test_karpathy_file_and_pictures(scenes: Scenes) -> None:
    document = json.loads((scenes.folder / "dataset_scenes.json").read_text())
    assert document["dataset"] == "scenes"
    assert Counter(image["split"] for image in document["images"]) == scenes.counts
    for number, image in enumerate(document["images"]):
        stem, ids = f"scenes_{number:012d}", list(range(5 * number, 5 * number + 5))
        sentences = [
            {"tokens": re.findall(r"[a-z]+", raw.lower()), "raw": raw, "imgid": number, "sentid": sentid}
            for sentid, raw in zip(ids, scenes.captions(stem), strict=True)
        ]
        expected = {"filename": f"{stem}.jpg", "imgid": number, "sentids": ids, "sentences": sentences}
        assert image == {**expected, "split": image["split"]}
        with Image.open(scenes.folder / "images" / image["filename"]) as picture:
            assert (picture.size, picture.mode) == ((WIDTH, HEIGHT), "RGB")


def test_feature_files(scenes: Scenes) -> None:
    for stem in scenes.images:
        with np.load(scenes.folder / f"features/{stem}.npz", allow_pickle=False) as record:
            features, norm_bb, conf = record["features"], record["norm_bb"], record["conf"]
        assert features.dtype == norm_bb.dtype == conf.dtype == np.float16
        count = len(features)
        assert 10 <= count <= 16
        assert (features.shape, norm_bb.shape, conf.shape) == ((count, 2048), (count, 6), (count,))
        assert np.isfinite(features).all()
        assert features.min() >= 0
        assert (features.max(axis=1) > 0.5).all()  # no region is blank
        assert 0.1 < features.astype(float).mean() < 2
        assert (np.diff(conf) <= 0).all()
        assert 0 < conf.min() <= conf.max() < 1
        assert 0 <= norm_bb.min() <= norm_bb.max() <= 1
        corner, opposite, sides = np.split(norm_bb.astype(float), 3, axis=1)
        assert (opposite > corner).all()
        np.testing.assert_allclose(opposite - corner, sides, atol=1e-3)


def test_entities_files(scenes: Scenes) -> None:
    seen: set[int] = set()
    for stem in scenes.images:
        tree = ElementTree.parse(scenes.folder / f"entities/Annotations/{stem}.xml")
        assert tree.findtext("filename") == f"{stem}.jpg"
        assert [tree.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == [str(WIDTH), str(HEIGHT), "3"]
        annotated = read_annotated(scenes.folder / "entities", stem)
        nouns: dict[int, set[str]] = {}
        for caption in annotated.captions:
            for chain, _, place in caption.phrases:
                first, *_, last = " ".join(caption.words[place.start : place.stop]).lower().split()
                nouns.setdefault(chain, set()).add(last)
                if chain not in annotated.scenes:
                    assert len(annotated.boxes[chain]) == NUMBERS.get(first, 1), caption
        assert all(len(names) == 1 or names == {"picture", "drawing"} for names in nouns.values())  # a chain is one thing
        chains = annotated.boxes.keys() | annotated.scenes
        assert seen.isdisjoint(chains)
        seen |= chains
    readme = (scenes.folder / "README.txt").read_text()
    assert "DRAWN SCENES" in readme
    assert "--items {} {} --relations {}".format(*scenes.recipe.items, scenes.recipe.relations) in readme


def test_a_linear_probe_reads_shape_colour_and_size(mixed: Scenes) -> None:
    regions, things, held_out = [], [], []
    for stem, present in mixed.things.items():
        with np.load(mixed.folder / f"features/{stem}.npz") as record:
            boxes = record["norm_bb"].astype(float)[:, :4] * [WIDTH, HEIGHT, WIDTH, HEIGHT]
            overlaps = iou(np.array([thing.box for thing in present]), boxes)
            assert (overlaps.max(axis=1) > 0.75).all(), "an item without a region"
            regions.append(record["features"][overlaps.argmax(axis=1)].astype(float))
        things += present
        held_out += [mixed.images[stem]["split"] == "test"] * len(present)
    features, test = np.concatenate(regions), np.array(held_out)
    features -= features[~test].mean(axis=0)
    kernel = features @ features[~test].T
    for attribute, names in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))):
        answers = np.array([names.index(getattr(thing, attribute)) for thing in things])
        targets = np.eye(len(names))[answers[~test]]
        weights = np.linalg.solve(kernel[~test] + 30.0 * np.eye(len(targets)), targets - targets.mean(axis=0))
        accuracy = ((kernel[test] @ weights + targets.mean(axis=0)).argmax(axis=1) == answers[test]).mean()
        assert accuracy >= 0.97, f"{attribute}: {accuracy:.3f}"


def test_files_depend_on_the_seed_and_not_on_the_number_of_workers_or_other_splits(tmp_path: Path) -> None:
    folders = [make(tmp_path / str(seed + n), Recipe(seed), n, 8, 2, 10).folder for seed, n in ((3, 1), (3, 2), (5, 1))]
    one, two, other = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders)
    assert len(one) == 4 * 20 + 4
    assert one == two
    assert one[Path("dataset_scenes.json")] != other[Path("dataset_scenes.json")]
    few, many = (plan({"train": train, "val": 3, "test": 20}, Recipe(3)) for train in (5, 150))
    assert [scene_of(job, Recipe(3)) for job in few[-20:]] == [scene_of(job, Recipe(3)) for job in many[-20:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "0"], "--train 0: expected at least 1"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--twins", "1.5"], "--twins 1.5: expected a share"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--relations", "1"], "--relations 1: expected 2 to 5"),
        (["--items", "2", "4"], "--items 2 4: expected two numbers from 3 to 6"),
        (["--items", "4", "2", "--relations", "5"], "--items 4 2: expected two numbers from 2 to 6, the smaller first"),
        (["--items", "3", "7"], "--items 3 7: expected"),
    ],
)
def test_impossible_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in fails(capsys, main, ["--output", str(tmp_path / "scenes"), *options])
    assert not list(tmp_path.iterdir())
    assert f"{tmp_path}: " in fails(capsys, main, ["--output", str(tmp_path)])


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("stop")

    monkeypatch.setattr("examples.scenes.dataset.write_winoground", fail)
    with pytest.raises(RuntimeError, match="stop"):
        make(tmp_path, Recipe(0), 1, 1, 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_ablation_compares_all_regularisers_on_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    for name in ("txt_db/itm_scenes_test.db", "img_db/scenes", "scenes/winoground/examples.jsonl"):
        (tmp_path / "demo/relations" / name).mkdir(parents=True)
    path = "config/ablation-scenes-relations.json"
    runs = planned(read_json_as(Grid, path), path, tmp_path / "out", TrainOptions)
    assert {run.options.IAIS for run in runs} == {None, *naive.ALIGNMENTS}
    assert Counter(run.seed for run in runs) == dict.fromkeys(range(1, 6), 1 + len(naive.ALIGNMENTS))
    assert runs[0].options.IAIS is None  # the baseline
    assert runs[0].options.neighbours == "demo/relations/scenes/twins.json"

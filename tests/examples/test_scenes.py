"""The scenes dataset: true captions, honest twins, readable files, and features that tell shape, colour and size."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from examples.scenes.dataset import Recipe, images_per_caption, plan, scene_of
from examples.scenes.layout import COLOURS, HEIGHT, SIZES, WIDTH, Item
from examples.scenes.shapes import SHAPES
from scripts.make_scenes import main

COUNTS = {"train": 150, "val": 4, "test": 60}
TWINS = 0.2
SEED = 3
RECIPE = Recipe(SEED, TWINS)


def arguments(output: Path, counts: dict[str, int], *more: str) -> list[str]:
    numbers = [word for split, count in counts.items() for word in (f"--{split}", str(count))]
    return ["--output", str(output), "--seed", str(SEED), "--twins", str(TWINS), *numbers, *more]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scenes") / "out"
    main(arguments(output, COUNTS, "--workers", "2"))
    return output


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[dict[str, Any]]:
    return json.loads((scenes / "dataset_scenes.json").read_text())["images"]


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[Item, ...]]:
    return {job.stem: scene_of(job, RECIPE).items for job in plan(COUNTS, RECIPE)}


# --- an independent reader of captions ------------------------------------------------------------------------------------

NOUN = rf"an? (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
SIDE = r"(?:to|on) the (left|right) of|(above|higher)(?: than)?|(below|lower)(?: than)?"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def lies(side: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Boxes are xmin, ymin, xmax, ymax; y points down."""
    return {"left": a[2] < b[0], "right": a[0] > b[2], "above": a[3] < b[1], "below": a[1] > b[3]}[side]


def is_true(caption: str, things: list[tuple[str, str, str, tuple[int, ...]]]) -> bool:
    """Whether the caption is true of (size, colour, shape, box) things; fails on a caption without a claim it can read."""
    text = caption.lower()
    nouns = list(re.finditer(NOUN, text))
    assert len(nouns) >= 2, caption
    boxes = []
    for noun in nouns:
        size, colour, shape = noun.groups()
        found = [box for s, c, f, box in things if (c, f) == (colour, shape) and size in (None, s)]
        if not found:
            return False
        assert len(found) == 1, f"{caption}: {noun.group()} is ambiguous"
        boxes.append(found[0])
    sides = list(re.finditer(SIDE, text))
    for number, match in enumerate(sides, start=1):
        word = next(group for group in match.groups() if group)
        if not lies({"higher": "above", "lower": "below"}.get(word, word), boxes[0], boxes[number]):
            return False
    count = re.search(rf"\b({'|'.join(NUMBERS)}) (shape|{'|'.join(SHAPES)})(?:s|es)\b", text)
    if count:
        number_word, kind = count.groups()
        if NUMBERS[number_word] != sum(kind in ("shape", shape) for _, _, shape, _ in things):
            return False
    assert sides or count or len(nouns) == 3, caption
    return True


def boxes_of(scenes: Path, stem: str) -> list[tuple[int, ...]]:
    tree = ElementTree.parse(scenes / "entities" / "Annotations" / f"{stem}.xml")
    found = [entry.find("bndbox") for entry in tree.iter("object")]
    return [tuple(int(edge.text or "") for edge in box) for box in found if box is not None]


@pytest.fixture(scope="module")
def things(scenes: Path, items: dict[str, tuple[Item, ...]]) -> dict[str, list[tuple[str, str, str, tuple[int, ...]]]]:
    """What is in each picture: attributes as drawn, boxes as the XML files have them."""
    return {
        stem: [(i.size, i.colour, i.shape, box) for i, box in zip(drawn, boxes_of(scenes, stem), strict=True)]
        for stem, drawn in items.items()
    }


# --- pictures and captions ------------------------------------------------------------------------------------------------


def test_items_do_not_overlap_and_stay_inside(things: dict[str, list[Any]]) -> None:
    for stem, present in things.items():
        assert 3 <= len(present) <= 6
        boxes = [thing[3] for thing in present]
        for x1, y1, x2, y2 in boxes:
            assert 0 < x1 < x2 < WIDTH, stem
            assert 0 < y1 < y2 < HEIGHT, stem
        for a, b in combinations(boxes, 2):
            assert any(lies(side, a, b) for side in ("left", "right", "above", "below")), stem


def test_captions_are_true_varied_and_of_moderate_length(images: list[dict[str, Any]], things: dict[str, list[Any]]) -> None:
    claims: Counter[str] = Counter()
    for image in images:
        raws = [sentence["raw"] for sentence in image["sentences"]]
        assert len(set(raws)) == 5
        for raw in raws:
            assert is_true(raw, things[Path(image["filename"]).stem]), (image["filename"], raw)
            assert 6 <= len(raw.split()) <= 25, raw
            assert re.fullmatch(r"[A-Z][a-z]*([ ,]+[a-z]+)*\.", raw), raw
            claims.update(
                word for word in ("left", "right", "above", "below", "two", "four", "together") if word in raw.split()
            )
    assert min(claims.values()) > 10
    assert len(claims) == 7


def test_a_caption_identifies_its_image_among_200() -> None:
    jobs = [job for job in plan({"train": 1, "val": 1, "test": 200}, Recipe(0)) if job.split == "test"]
    fitting = images_per_caption(jobs, Recipe(0))
    assert fitting.min() == 1  # its own
    assert np.median(fitting) == 1
    assert fitting.mean() < 1.3


# --- twins ----------------------------------------------------------------------------------------------------------------


def test_winoground_examples_share_words_and_differ_in_truth(
    scenes: Path, images: list[Any], things: dict[str, list[Any]]
) -> None:
    examples = [json.loads(line) for line in (scenes / "winoground" / "examples.jsonl").read_text().splitlines()]
    raws = {
        Path(image["filename"]).stem: [s["raw"] for s in image["sentences"]] for image in images if image["split"] == "test"
    }
    assert len(examples) == 12  # 20 % of 60 images are 6 pairs, two captions each
    assert [example["id"] for example in examples] == list(range(12))
    keys = {"id", "image_0", "image_1", "caption_0", "caption_1", "tag", "secondary_tag", "num_main_preds", "collapsed_tag"}
    for example in examples:
        assert set(example) == keys
        assert Counter(example["caption_0"].split()) == Counter(example["caption_1"].split())  # letter case included
        for text in (0, 1):
            assert example[f"caption_{text}"] in raws[example[f"image_{text}"]]
            for image in (0, 1):
                assert is_true(example[f"caption_{text}"], things[example[f"image_{image}"]]) == (text == image)


def test_twins_are_the_same_picture_but_for_two_places(scenes: Path, things: dict[str, list[Any]]) -> None:
    jobs = plan(COUNTS, RECIPE)
    for split, count in COUNTS.items():
        assert sum(job.split == split and job.pair is not None for job in jobs) == 2 * round(count * TWINS / 2)
    pairs = {job.pair: job.stem for job in jobs if job.split == "train" and job.pair is not None}
    for number in range(len(pairs) // 2):
        one, other = things[pairs[number, 0]], things[pairs[number, 1]]
        assert [thing[:3] for thing in one] == [thing[:3] for thing in other]
        assert sum(a[3] != b[3] for a, b in zip(one, other, strict=True)) == 2


# --- files ----------------------------------------------------------------------------------------------------------------


def test_karpathy_file(scenes: Path, images: list[dict[str, Any]]) -> None:
    assert json.loads((scenes / "dataset_scenes.json").read_text())["dataset"] == "scenes"
    assert Counter(image["split"] for image in images) == COUNTS
    assert [image["imgid"] for image in images] == list(range(sum(COUNTS.values())))
    sentids = [sentence["sentid"] for image in images for sentence in image["sentences"]]
    assert sentids == list(range(5 * len(images)))
    for image in images:
        assert image["filename"] == f"scenes_{image['imgid']:012d}.jpg"
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for sentence in image["sentences"]:
            assert sentence["imgid"] == image["imgid"]
            assert sentence["tokens"] == re.findall(r"[a-z]+", sentence["raw"].lower())
    with Image.open(scenes / "images" / images[0]["filename"]) as picture:
        assert (picture.size, picture.mode) == ((WIDTH, HEIGHT), "RGB")


def test_feature_files(scenes: Path, images: list[dict[str, Any]]) -> None:
    for image in images:
        with np.load(scenes / "features" / f"{Path(image['filename']).stem}.npz", allow_pickle=False) as record:
            features, norm_bb, conf = record["features"], record["norm_bb"], record["conf"]
        assert features.dtype == norm_bb.dtype == conf.dtype == np.float16
        assert 10 <= len(features) <= 16
        assert features.shape[1:] == (2048,)
        assert norm_bb.shape == (len(features), 6)
        assert conf.shape == (len(features),)
        assert np.isfinite(features).all()
        assert features.min() >= 0
        assert (features.max(axis=1) > 0.5).all()  # no region is blank
        assert 0.1 < features.astype(float).mean() < 2
        assert (np.diff(conf) <= 0).all()
        assert conf.min() > 0
        assert conf.max() < 1
        x1, y1, x2, y2, width, height = norm_bb.astype(float).T
        assert (norm_bb >= 0).all()
        assert (norm_bb <= 1).all()
        assert (x2 > x1).all()
        assert (y2 > y1).all()
        np.testing.assert_allclose([x2 - x1, y2 - y1], [width, height], atol=1e-3)


def test_entities_files(scenes: Path, images: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for image in images:
        stem = Path(image["filename"]).stem
        tree = ElementTree.parse(scenes / "entities" / "Annotations" / f"{stem}.xml")
        assert tree.findtext("filename") == image["filename"]
        assert [tree.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == [str(WIDTH), str(HEIGHT), "3"]
        boxed = Counter(int(n.text or "") for o in tree.iter("object") if o.find("bndbox") is not None for n in o.iter("name"))
        unboxed = {int(n.text or "") for o in tree.iter("object") if o.find("nobndbox") is not None for n in o.iter("name")}
        words: dict[int, set[str]] = {}
        lines = (scenes / "entities" / "Sentences" / f"{stem}.txt").read_text().splitlines()
        assert len(lines) == 5
        for line, sentence in zip(lines, image["sentences"], strict=True):
            plain = re.sub(r"\[/EN#\d+/\w+ ([^\]]+)\]", r"\1", line)
            assert plain.replace(" ,", ",").replace(" .", ".") == sentence["raw"]
            for chain, kind, phrase in re.findall(r"\[/EN#(\d+)/(\w+) ([^\]]+)\]", line):
                assert (int(chain) in boxed, int(chain) in unboxed) == (kind == "other", kind == "scene")
                first, *_, last = phrase.lower().split()
                words.setdefault(int(chain), set()).add(last)
                if kind == "other":
                    assert boxed[int(chain)] == NUMBERS.get(first, 1), line
        assert all(len(nouns) == 1 or nouns == {"picture", "drawing"} for nouns in words.values())  # a chain is one thing
        assert not seen & (set(boxed) | unboxed)
        seen |= set(boxed) | unboxed


def test_readme_says_what_it_is(scenes: Path) -> None:
    assert "DRAWN SCENES" in (scenes / "README.txt").read_text()
    assert "say nothing about Flickr30k" in (scenes / "README.txt").read_text()


# --- features -------------------------------------------------------------------------------------------------------------


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    common = np.prod(np.clip(high - low, 0, None))
    return float(common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common))


def test_a_linear_probe_reads_shape_colour_and_size(scenes: Path, items: dict[str, tuple[Item, ...]]) -> None:
    rows: dict[bool, list[np.ndarray]] = {True: [], False: []}
    labels: dict[bool, list[Item]] = {True: [], False: []}
    for job in plan(COUNTS, RECIPE):
        with np.load(scenes / "features" / f"{job.stem}.npz") as record:
            boxes = record["norm_bb"].astype(float)[:, :4] * [WIDTH, HEIGHT, WIDTH, HEIGHT]
            for item in items[job.stem]:
                overlaps = [overlap(np.array(item.box), box) for box in boxes]
                assert max(overlaps) > 0.75, "an item without a region"
                rows[job.split == "test"].append(record["features"][int(np.argmax(overlaps))].astype(float))
                labels[job.split == "test"].append(item)
    train, test = np.array(rows[False]), np.array(rows[True])
    mean = train.mean(axis=0)
    gram = (train - mean) @ (train - mean).T
    kernel = (test - mean) @ (train - mean).T
    for attribute, names in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))):
        answer = {held_out: np.array([names.index(getattr(i, attribute)) for i in labels[held_out]]) for held_out in labels}
        targets = np.eye(len(names))[answer[False]]
        weights = np.linalg.solve(gram + 30.0 * np.eye(len(train)), targets - targets.mean(axis=0))
        accuracy = ((kernel @ weights + targets.mean(axis=0)).argmax(axis=1) == answer[True]).mean()
        assert accuracy >= 0.97, f"{attribute}: {accuracy:.3f}"


# --- the program ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    counts = {"train": 8, "val": 2, "test": 10}
    for workers in (1, 2):
        main(arguments(tmp_path / str(workers), counts, "--workers", str(workers)))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert len(one) == 4 * 20 + 4
    assert one == two
    main([*arguments(tmp_path / "other", counts, "--workers", "1"), "--seed", str(SEED + 1)])
    assert contents(tmp_path / "other")["dataset_scenes.json"] != one["dataset_scenes.json"]


def test_images_of_a_split_do_not_depend_on_the_other_splits() -> None:
    few, many = plan({"train": 5, "val": 3, "test": 20}, RECIPE), plan(COUNTS | {"test": 20}, RECIPE)
    assert [scene_of(job, RECIPE) for job in few[-20:]] == [scene_of(job, RECIPE) for job in many[-20:]]


@pytest.mark.parametrize("wrong", [["--train", "0"], ["--workers", "0"], ["--twins", "1.5"], ["--seed", "-1"]])
def test_impossible_values_are_refused(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "out"), *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("stop")

    monkeypatch.setattr("examples.scenes.files.write_winoground", fail)
    with pytest.raises(RuntimeError, match="stop"):
        main(arguments(tmp_path / "out", {"train": 1, "val": 1, "test": 1}, "--workers", "1"))
    assert list(tmp_path.iterdir()) == []

"""Winoground's three scores against a table made by hand and a naive count, and the lines of examples.jsonl."""

from __future__ import annotations

import json
import re
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.image_db import ImageDatabase, ImageDatabaseWriter
from evaluation.winoground import CHANCE, Example, find_records, outcomes, read_examples, summary, table, ties
from utils.errors import InputError

# (scores of caption 0 with images 0 and 1, of caption 1 with them), and which of text, image, group are correct
BY_HAND = [
    ([[3, 1], [2, 4]], (True, True, True)),
    ([[3, 1], [2, 2.5]], (True, True, True)),
    ([[5, 3], [1, 4]], (True, True, True)),
    ([[5, 3], [4.5, 4]], (True, False, False)),  # caption 1 prefers image 0
    ([[5, 4.5], [3, 4]], (False, True, False)),  # image 1 prefers caption 0
    ([[1, 2], [2, 1]], (False, False, False)),
    ([[2, 1], [2, 3]], (False, True, False)),  # a tie for image 0
    ([[2, 2], [1, 3]], (True, False, False)),  # a tie for caption 0
    ([[1, 1], [1, 1]], (False, False, False)),  # four ties
]
SCORES = np.array([scores for scores, _ in BY_HAND], np.float32)


def example(number: int, **fields: Any) -> Example:
    """Two examples share a pair of images."""
    return Example(number, f"ex_{number // 2}_img_0", f"ex_{number // 2}_img_1", f"a {number} b", f"b {number} a", **fields)


def test_outcomes_and_ties_by_hand() -> None:
    assert list(zip(*outcomes(SCORES).values(), strict=True)) == [expected for _, expected in BY_HAND]
    assert ties(SCORES) == {"text": 1 + 2, "image": 1 + 2}


def test_random_scores_are_correct_as_often_as_published() -> None:
    correct = outcomes(np.random.default_rng(0).random((20_000, 2, 2), np.float32))
    assert {name: values.mean() for name, values in correct.items()} == pytest.approx(CHANCE, abs=0.01)


def test_summary_by_tag_and_over_pairs_of_images() -> None:
    scores = np.random.default_rng(1).normal(size=(400, 2, 2)) + 0.8 * np.eye(2)
    tags = ["Object", "Relation", "Both", ""]
    examples = [example(number, collapsed_tag=tags[number % 4], num_main_preds=1 + number % 2) for number in range(400)]
    results, correct = summary(examples, scores), outcomes(scores)
    assert {name: results[name] for name in CHANCE} == pytest.approx({name: correct[name].mean() for name in CHANCE})
    assert results["counts"] == {"examples": 400, "image_pairs": 200, "images": 400}
    assert results["ties"] == {"text": 0, "image": 0}
    assert set(results["by_tag"]["collapsed_tag"]) == {"Object", "Relation", "Both"}
    assert results["by_tag"]["tag"] == results["by_tag"]["secondary_tag"] == {}
    for number, tag in enumerate(tags[:3]):
        group = results["by_tag"]["collapsed_tag"][tag]
        assert (group["examples"], group["group"]) == (100, pytest.approx(correct["group"][number::4].mean()))
    assert results["by_tag"]["num_main_preds"]["2"]["text"] == pytest.approx(correct["text"][1::2].mean())
    low, high = results["interval_95"]["text"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(results["text"] * (1 - results["text"]) / 400), rel=0.2)
    assert json.loads(json.dumps(results)) == results


def test_examples_of_a_pair_of_images_are_resampled_together() -> None:
    """Two identical outcomes for each pair carry no more information than one."""
    once = np.random.default_rng(2).normal(size=(100, 2, 2)) + 0.8 * np.eye(2)
    twice = summary([example(number) for number in range(200)], once.repeat(2, axis=0))
    alone = summary([example(2 * number) for number in range(100)], once)
    assert twice["interval_95"] == alone["interval_95"]
    assert table(twice).splitlines()[2] == table(alone).splitlines()[2]


IMAGES = {"image_0": "ex_7_img_0", "image_1": "ex_7_img_1"}
GOOD = {"id": 7, **IMAGES, "caption_0": "a mug in some grass", "caption_1": "some grass"}


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    tags = {"tag": "Noun Phrase", "secondary_tag": "", "num_main_preds": 2, "collapsed_tag": "Object"}
    path.write_text("\ufeff" + json.dumps(GOOD | tags) + "\n\n" + json.dumps(GOOD | {"id": "eight\u2028"}, ensure_ascii=False))
    assert read_examples(path) == {1: Example(**GOOD, **tags), 3: Example(**GOOD | {"id": "eight\u2028"})}
    for contents, message in (("\n\n", "has no example"), ('{"id": 1}', "line 1: .*missing required")):
        path.write_text(contents)
        with pytest.raises(InputError, match=f"^{path}: {message}"):
            read_examples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"caption_0": ["a", "b"]}, "$.caption_0"),
        ({"caption_0": ""}, "$.caption_0"),
        ({"image_1": None}, "$.image_1"),
        ({"num_main_preds": "two"}, "$.num_main_preds"),
        ({"image_1": "ex_7_img_0"}, "both 'ex_7_img_0', expected two images"),
        ({"id": 6}, "id 6 is on line 1 already"),
        ({"id": 1.5}, "$.id"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_lines(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f"{json.dumps(GOOD | {'id': 6})}\n{json.dumps(GOOD | line)}\n")
    with pytest.raises(InputError, match=f"line 2: .*{re.escape(message)}"):
        read_examples(path)


@pytest.mark.parametrize("prefixes", [[""], ["winoground_"], ["", "winoground_"], ["one_", "another_"]], ids=str)
def test_names_of_records(tmp_path: Path, prefixes: list[str]) -> None:
    """Records have the names of the images, or all have the same prefix."""
    with ImageDatabaseWriter(tmp_path / "db") as writer:
        for prefix, name in product(prefixes, IMAGES.values()):
            writer.put(f"{prefix}{name}.npz", np.ones((2, 8)), np.ones((2, 6)), np.ones(2))
    examples = {1: Example(**GOOD), 2: Example(**GOOD | {"image_1": "ex_7_img_1.png"})}
    with closing(ImageDatabase(tmp_path / "db")) as image_db:
        if len(prefixes) == 1 or "" in prefixes:
            names = [*IMAGES.values(), "ex_7_img_1.png"]
            expected = {name: f"{prefixes[0]}{name.removesuffix('.png')}.npz" for name in names}
            assert find_records(tmp_path, examples, image_db) == expected
        else:
            with pytest.raises(InputError, match=r"has no ex_7_img_0\.npz"):
                find_records(tmp_path, examples, image_db)

"""Candidates: reading files, the recall they allow at most, and sampling for quick validation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from evaluation.candidates import Candidates, read_candidates, sampled_candidates
from evaluation.recall import ranks, recalls
from tests.conftest import BUNDLED
from utils.errors import InputError

TEXTS, IMAGES = ["t0", "t1", "t2", "t\u2028\t3"], ["a.npz", "b.npz", "c.npz"]
IMAGE_OF = np.array([0, 0, 1, 2])


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "candidates.jsonl"
    texts = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
    path.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
    return path


def line(text: str, *images: str) -> dict[str, object]:
    return {"text": text, "images": images}


def test_reading(tmp_path: Path) -> None:
    candidates = read_candidates(
        written(tmp_path, line("t2", "c.npz", "a.npz"), "", line("t\u2028\t3", "b.npz"), line("t0")), TEXTS, IMAGES
    )
    assert [candidates.of_text(text).tolist() for text in range(4)] == [[], [], [0, 2], [1]]
    same = written(tmp_path, line("t\u2028\t3", "b.npz"), line("t2", "a.npz", "c.npz"))
    assert candidates.fingerprint() == read_candidates(same, TEXTS, IMAGES).fingerprint()
    other = written(tmp_path, line("t\u2028\t3", "b.npz", "c.npz"), line("t2", "a.npz"))
    assert candidates.fingerprint() != read_candidates(other, TEXTS, IMAGES).fingerprint()


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{", "truncated; expected {"),
        ("[" * 100_000, "; expected {"),
        (b'{"text": "\xff"}', "utf-8"),
        ({"text": 2, "images": []}, "`$.text`; expected {"),
        ({"text": "t1", "images": ["a.npz", None]}, "`$.images[1]`; expected {"),
        ({"text": "t1"}, "missing required field `images`"),
        ({"text": "t1", "images": [], "scores": []}, "unknown field `scores`"),
        ({"text": "\ud800", "images": []}, "; expected {"),
        (line("t9", "a.npz"), "text 't9' is not in the split; expected one of its 4 texts, such as 't0'"),
        (line("t1", "a.npz", "a"), "image 'a' is not in the split; expected one of its 3 images, such as 'a.npz'"),
        (line("t1", "b.npz", "a.npz", "b.npz"), "image 'b.npz' is listed 2 times, expected once"),
        (line("t0", "c.npz"), "text 't0' is on line 1 already"),
        (line("t9" * 1000), "text 't9t9"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_lines(tmp_path: Path, damaged: object, message: str) -> None:
    path = written(tmp_path, line("t0", "b.npz"), "", damaged)
    with pytest.raises(InputError, match=f"^{path}: line 3: .*{re.escape(message)}") as caught:
        read_candidates(path, TEXTS, IMAGES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_without_candidates(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none", "no such file, expected lines"),
        (written(tmp_path, "", line("t0")), "lists no pair, expected candidates"),
    ):
        with pytest.raises(InputError, match=f"^{path}: {re.escape(message)}"):
            read_candidates(path, TEXTS, IMAGES)


def test_counts_by_hand() -> None:
    """Image 0 is found by its second text; image 1 has no text that lists it; text 3 has nothing."""
    candidates = Candidates.of([[1, 2], [0, 1], [2], []])
    assert candidates.counts(IMAGE_OF) == {
        "pairs": 5,
        "texts_without_candidates": 1,
        "texts_without_their_image": 3,
        "images_without_a_text": 2,
        "at_most": {"txt": 1 / 3, "img": 1 / 4},
    }
    numbers = re.findall(r"\d[\d.]*", candidates.summary(IMAGE_OF))
    assert numbers == ["5", "12", "3", "4", "25.00", "2", "3", "33.33"]


@pytest.mark.parametrize("seed", range(4))
def test_perfect_scores_reach_the_ceiling_and_no_more(seed: int) -> None:
    """Unlisted positives are misses in both directions, even if nothing else is left in a row or column."""
    rng = np.random.default_rng(seed)
    image_of = rng.integers(0, 10, 60)
    candidates = Candidates.of([rng.choice(10, rng.integers(0, 4), replace=False) for _ in range(60)])
    scores = np.full((60, 10), -np.inf, np.float32)
    for text, image in enumerate(image_of):
        listed = candidates.of_text(text)
        scores[text, listed] = listed == image
    counts, ranked = candidates.counts(image_of), ranks(scores, image_of)
    for name, recall in recalls(ranked).items():
        if name != "r_mean":
            assert recall == pytest.approx(counts["at_most"][name[:3]])


@pytest.mark.parametrize("count", [2, 7, 40, 1000])
def test_sampled_candidates_have_the_own_image_and_others(count: int) -> None:
    split = BUNDLED.source()
    candidates = sampled_candidates(split, count)
    rows = candidates.images.reshape(len(split.text_db), min(count, 40))
    for row, own in zip(rows.tolist(), split.image_of.tolist(), strict=True):
        assert own in row
        assert row == sorted(set(row) & set(range(40)))
    assert candidates.fingerprint() == sampled_candidates(split, count).fingerprint()
    if count == 7:
        assert len({row.tobytes() for row in rows}) > 150

"""Recall against counting by hand, and ties."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.recall import ranks, recalls, sampled_recalls, table

IMAGE_OF = {f"t{i}": f"v{i // 3}" for i in range(36)}
TEXTS, IMAGES = sorted(IMAGE_OF), sorted(set(IMAGE_OF.values()))
COLUMNS = np.array([IMAGES.index(IMAGE_OF[text]) for text in TEXTS])
OWN = COLUMNS[:, None] == np.arange(len(IMAGES))


def by_hand(scores: np.ndarray) -> dict[str, float]:
    """Sort each row and each column, positives last among equals, and look for the positive."""
    result = {}
    for cutoff in (1, 5, 10):
        found = 0
        for row, text in enumerate(TEXTS):
            order = sorted(range(len(IMAGES)), key=lambda j: (-scores[row, j], IMAGES[j] == IMAGE_OF[text]))
            found += IMAGE_OF[text] in [IMAGES[j] for j in order[:cutoff]]
        result[f"img_r{cutoff}"] = found / len(TEXTS)
        found = 0
        for column, image in enumerate(IMAGES):
            order = sorted(range(len(TEXTS)), key=lambda i: (-scores[i, column], IMAGE_OF[TEXTS[i]] == image))
            found += image in [IMAGE_OF[TEXTS[i]] for i in order[:cutoff]]
        result[f"txt_r{cutoff}"] = found / len(IMAGES)
    return result


def ties_by_hand(scores: np.ndarray) -> dict[str, int]:
    """Negatives with the very score of the best positive, over all rows and over all columns."""
    by_row = sum(int((row[~mine] == row[mine]).sum()) for row, mine in zip(scores, OWN, strict=True))
    by_column = sum(int((column[~mine] == column[mine].max()).sum()) for column, mine in zip(scores.T, OWN.T, strict=True))
    return {"txt": by_column, "img": by_row}


@pytest.mark.parametrize("levels", [10**6, 7], ids=["no ties", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_recalls_match_counting_by_hand(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = ((rng.integers(0, levels, (36, 12)) + round(0.3 * levels) * OWN) / levels).astype(np.float32)
    found = ranks(scores, COLUMNS)
    measured, expected = recalls(found), by_hand(scores)
    assert {key: measured[key] for key in expected} == pytest.approx(expected)
    for way in ("txt", "img"):
        assert measured[f"{way}_r_mean"] == pytest.approx(np.mean([expected[f"{way}_r{k}"] for k in (1, 5, 10)]))
    assert measured["r_mean"] == pytest.approx((measured["txt_r_mean"] + measured["img_r_mean"]) / 2)
    assert list(measured) == [
        "txt_r1",
        "txt_r5",
        "txt_r10",
        "txt_r_mean",
        "img_r1",
        "img_r5",
        "img_r10",
        "img_r_mean",
        "r_mean",
    ]
    assert found.ties == ties_by_hand(scores)
    assert (sum(found.ties.values()) > 0) == (levels == 7)


def test_a_constant_score_finds_nothing() -> None:
    assert recalls(ranks(np.zeros((36, 12), np.float32), COLUMNS))["r_mean"] == 0


def test_images_without_a_text_are_candidates_and_no_queries() -> None:
    """As where some texts of a split are left out; and a matrix of more rows than are read at a time."""
    rng = np.random.default_rng(5)
    columns = rng.integers(0, 3, 600)
    scores = rng.random((600, 5), np.float32)
    found = ranks(scores, columns)
    assert (len(found.img), len(found.txt)) == (600, 3)
    for text in (0, 255, 256, 599):
        assert found.img[text] == (scores[text] > scores[text, columns[text]]).sum()
    for image in range(3):
        best = scores[columns == image, image].max()
        assert found.txt[image] == (scores[columns != image, image] >= best).sum()


def test_sampled_recalls_rank_the_first_candidate() -> None:
    scores = np.array([[0.5, 0.4, 0.1], [0.5, 0.5, 0.1], [0.0, 0.5, 0.6]], np.float32)  # ranks 0, 1 and 2
    expected = {"img_r1": 1 / 3, "img_r5": 1, "img_r10": 1, "img_r_mean": 7 / 9, "r_mean": 7 / 9}
    assert sampled_recalls(ranks(scores, np.zeros(3, np.int32))) == pytest.approx(expected)


def test_table_has_a_line_a_name() -> None:
    perfect = recalls(ranks(OWN.astype(np.float32), COLUMNS))
    lines = table({"one": perfect, "another": perfect}).splitlines()
    assert len(lines) == 4
    assert lines[-1].split() == ["another"] + ["100.00"] * 7

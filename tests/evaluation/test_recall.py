"""Recall against counting by hand, and ties."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.recall import own_pairs, recalls, sampled_recalls, table, ties

IMAGE_OF = {f"t{i}": f"v{i // 3}" for i in range(36)}
TEXTS, IMAGES = sorted(IMAGE_OF), sorted(set(IMAGE_OF.values()))


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


@pytest.mark.parametrize("levels", [10**6, 7], ids=["no ties", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_recalls_match_counting_by_hand(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    own = own_pairs(TEXTS, IMAGES, IMAGE_OF)
    scores = ((rng.integers(0, levels, (36, 12)) + round(0.3 * levels) * own) / levels).astype(np.float32)
    measured, expected = recalls(scores, own), by_hand(scores)
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
    assert (ties(scores, own) > 0) == (levels == 7)


def test_a_constant_score_finds_nothing() -> None:
    own = own_pairs(TEXTS, IMAGES, IMAGE_OF)
    assert recalls(np.zeros((36, 12), np.float32), own)["r_mean"] == 0


def test_candidates_that_were_not_scored_rank_below() -> None:
    own = own_pairs(TEXTS, IMAGES, IMAGE_OF)
    scores = np.where(own, -5.0, -np.inf).astype(np.float32)
    assert sampled_recalls(scores, own) == {"img_r1": 1, "img_r5": 1, "img_r10": 1, "img_r_mean": 1, "r_mean": 1}


def test_table_has_a_line_a_name() -> None:
    own = own_pairs(TEXTS, IMAGES, IMAGE_OF)
    lines = table({"one": recalls(own.astype(np.float32), own), "another": recalls(own.astype(np.float32), own)}).splitlines()
    assert len(lines) == 4
    assert lines[-1].split() == ["another"] + ["100.00"] * 7

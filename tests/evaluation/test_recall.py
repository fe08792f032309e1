"""Recall against counting by hand, ties, and ranks of pairs that were not scored."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.recall import UNRANKED, ranks, recalls, sampled_recalls

TEXTS, IMAGES = 300, 60  # more rows than are read at a time
IMAGE_OF = np.random.default_rng(0).integers(0, IMAGES - 2, TEXTS)  # the other images are candidates but not queries
OWN = IMAGE_OF[:, None] == np.arange(IMAGES)
NINE = "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean"


def by_hand(scores: np.ndarray) -> dict[str, float]:
    """Sort each row and column, positives last among equals; count queries with a positive among the first K."""
    result = {}
    for direction, matrix, own in (("img", scores, OWN), ("txt", scores.T, OWN.T)):
        for cutoff in (1, 5, 10):
            hits = []
            for row, positive in zip(matrix, own, strict=True):
                order = sorted(range(len(row)), key=lambda j: (-row[j], positive[j]))
                if positive.any():
                    hits.append(any(positive[j] for j in order[:cutoff]))
            result[f"{direction}_r{cutoff}"] = sum(hits) / len(hits)
    return result


def ties_by_hand(scores: np.ndarray) -> dict[str, int]:
    """Count negatives with exactly the score of the best positive, over all rows and over all columns."""
    by_row = sum(int((row[~own] == row[own]).sum()) for row, own in zip(scores, OWN, strict=True))
    columns = [(column, own) for column, own in zip(scores.T, OWN.T, strict=True) if own.any()]
    by_column = sum(int((column[~own] == column[own].max()).sum()) for column, own in columns)
    return {"txt": by_column, "img": by_row}


@pytest.mark.parametrize("levels", [10**6, 7], ids=["no ties", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_recalls_match_counting_by_hand(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = ((rng.integers(0, levels, (TEXTS, IMAGES)) + round(0.3 * levels) * OWN) / levels).astype(np.float32)
    ranked = ranks(scores, IMAGE_OF)
    measured, expected = recalls(ranked), by_hand(scores)
    assert list(measured) == NINE.split()
    assert {key: measured[key] for key in expected} == pytest.approx(expected)
    for direction in ("txt", "img"):
        assert measured[f"{direction}_r_mean"] == pytest.approx(np.mean([expected[f"{direction}_r{k}"] for k in (1, 5, 10)]))
    assert measured["r_mean"] == pytest.approx((measured["txt_r_mean"] + measured["img_r_mean"]) / 2)
    assert ranked.ties == ties_by_hand(scores)
    assert (sum(ranked.ties.values()) > 0) == (levels == 7)


def test_unscored_positives_are_never_found() -> None:
    """Even with fewer images than the cutoff; they tie with nothing."""
    scores = np.full((4, 4), -np.inf, np.float32)
    scores[0, 0] = scores[1, 0] = 1  # the image of text 1 is image 1, which it was not scored with
    ranked = ranks(scores, np.arange(4))
    assert ranked.img.tolist() == [0, UNRANKED, UNRANKED, UNRANKED]
    assert ranked.txt.tolist() == [1, UNRANKED, UNRANKED, UNRANKED]
    assert ranked.ties == {"txt": 1, "img": 0}
    assert recalls(ranked)["img_r10"] == recalls(ranked)["txt_r10"] == 0.25


def test_sampled_recalls_rank_the_own_image() -> None:
    scores = np.array([[0.5, 0.4, 0.1], [0.5, 0.5, 0.1], [0.0, 0.5, 0.6]], np.float32)  # ranks 0, 1 and 2
    expected = {"img_r1": 1 / 3, "img_r5": 1, "img_r10": 1, "img_r_mean": 7 / 9, "r_mean": 7 / 9}
    assert sampled_recalls(ranks(scores, np.zeros(3, np.int32))) == pytest.approx(expected)

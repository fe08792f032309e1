"""The error analysis against naive twins, and the coverage of bootstrap intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluation.analysis import REGIONS, WORD_PIECES, Bootstrap, analyse, summary_table
from evaluation.recall import ranks, recalls

RNG = np.random.default_rng(3)
IMAGES, TEXTS = 30, 90
DESCRIBED = np.delete(np.arange(IMAGES), [3, 17])  # the other two have no text
IMAGE_OF = RNG.permutation(np.r_[DESCRIBED, RNG.choice(DESCRIBED, TEXTS - len(DESCRIBED))])
LENGTHS, BOXES = RNG.integers(3, 40, TEXTS), np.r_[11:60:7, RNG.integers(11, 60, IMAGES - 7)]
SCORES = RNG.normal(size=(TEXTS, IMAGES)).astype(np.float32)
SCORES[np.arange(TEXTS), IMAGE_OF] += 1.5


def candidates_only(share: float) -> np.ndarray:
    """``SCORES`` of a random share of the pairs, which need not be positive ones."""
    return np.where(np.random.default_rng(4).random(SCORES.shape) < share, SCORES, -np.inf).astype(np.float32)


@pytest.mark.parametrize(
    "scores", [SCORES, np.round(SCORES), candidates_only(0.7), candidates_only(0.2)], ids=["all", "ties", "70 %", "20 %"]
)
def test_against_a_naive_twin(scores: np.ndarray) -> None:
    ranked = ranks(scores, IMAGE_OF)
    result = analyse(ranked, IMAGE_OF, LENGTHS, BOXES)
    assert json.loads(json.dumps(result)) == result
    lines = summary_table(result).splitlines()
    assert len(lines) == 7
    assert any("∞ – ∞" in line for line in lines) == (result["img_median_rank"] is None)
    from_1 = {"img": dict(enumerate(ranked.img + 1.0)), "txt": dict(zip(DESCRIBED, ranked.txt + 1.0, strict=True))}
    expected = {key: {k: rank if rank <= TEXTS else np.inf for k, rank in of.items()} for key, of in from_1.items()}

    def recall(direction: str, cutoff: int, queries: list[int]) -> float:
        return float(np.mean([expected[direction][query] <= cutoff for query in queries]))

    for direction, of_queries in expected.items():
        values = np.array(list(of_queries.values()))
        median = np.median(values)
        assert result[f"{direction}_median_rank"] == (median if median < np.inf else None)
        assert result[f"{direction}_mean_reciprocal_rank"] == pytest.approx(np.mean(1 / values))
        assert result["unranked"][direction] == np.isinf(values).sum()
    assert sum(part["texts"] for part in result["by_word_pieces"]) == TEXTS
    for part in result["by_word_pieces"]:
        texts = [t for t in range(TEXTS) if part["from"] <= LENGTHS[t] <= (part["to"] or 10**9)]
        assert part["texts"] == len(texts)
        for k in (1, 5, 10):
            assert part[f"img_r{k}"] == pytest.approx(recall("img", k, texts))
    assert [part["from"] for part in result["by_word_pieces"]] == list(WORD_PIECES)
    for part in result["by_regions"]:
        images = [i for i in DESCRIBED if part["from"] <= BOXES[i] <= (part["to"] or 10**9)]
        texts = [t for t in range(TEXTS) if IMAGE_OF[t] in images]
        assert (part["images"], part["texts"]) == (len(images), len(texts))
        for k in (1, 5, 10):
            assert part[f"txt_r{k}"] == pytest.approx(recall("txt", k, images))
            assert part[f"img_r{k}"] == pytest.approx(recall("img", k, texts))
    assert [part["from"] for part in result["by_regions"]] == [first for first in REGIONS if 10 < first < 60]


def test_intervals_are_those_of_a_naive_bootstrap_of_images() -> None:
    ranked = ranks(SCORES, IMAGE_OF)
    intervals = analyse(ranked, IMAGE_OF, LENGTHS, BOXES)["interval_95"]
    rng = np.random.default_rng(0)
    statistics: dict[str, list[float]] = {}
    for _ in range(1000):
        drawn = rng.integers(len(DESCRIBED), size=len(DESCRIBED))
        texts = np.concatenate([np.flatnonzero(DESCRIBED[image] == IMAGE_OF) for image in drawn])
        resampled = ranked._replace(txt=ranked.txt[drawn], img=ranked.img[texts])
        of_resample = recalls(resampled) | {
            "img_median_rank": 1 + float(np.median(resampled.img)),
            "txt_mean_reciprocal_rank": float(np.mean(1 / (1 + resampled.txt))),
        }
        for name, value in of_resample.items():
            statistics.setdefault(name, []).append(value)
    for name, values in statistics.items():
        values.sort()
        assert intervals[name] == pytest.approx([values[25], values[-26]]), name
    assert set(intervals) == set(statistics) | {"img_mean_reciprocal_rank", "txt_median_rank"}
    assert analyse(ranked, IMAGE_OF, LENGTHS, BOXES)["interval_95"] == intervals


@pytest.mark.parametrize("median", [False, True])
def test_intervals_cover_the_truth_95_times_in_100(median: bool) -> None:
    """Five dependent observations per cluster. Taking them for independent covers it far less often."""
    rng = np.random.default_rng(6)
    clusters, of_each, worlds = 80, 5, 200
    bootstrap, cluster_of = Bootstrap(clusters, resamples=200), np.arange(clusters).repeat(of_each)
    independent, each = Bootstrap(clusters * of_each, resamples=200), np.arange(clusters * of_each)
    covered = naively = 0
    for _ in range(worlds):
        values = 0.5 + (rng.normal(size=(clusters, 1)) + 0.5 * rng.normal(size=(clusters, of_each))).ravel()
        low, high = bootstrap.interval(values, cluster_of, median)
        covered += low <= 0.5 <= high
        low, high = independent.interval(values, each)
        naively += low <= 0.5 <= high
    assert 0.90 <= covered / worlds <= 0.98
    assert naively / worlds < 0.75


def test_fewer_than_two_clusters_have_no_interval() -> None:
    bootstrap = Bootstrap(3)
    for median in (False, True):
        assert bootstrap.interval(np.array([1.0, 2.0]), np.array([1, 1]), median) is None
        assert bootstrap.interval(np.array([]), np.array([], int), median) is None
        assert bootstrap.interval(np.array([1.0, 2.0]), np.array([0, 2]), median) == [1, 2]
    columns = {"some": np.array([1.0, np.nan, 2.0]), "none": np.full(3, np.nan)}
    expected = {"some": 1.5, "none": None, "interval_95": {"some": [1, 2], "none": None}}
    assert bootstrap.estimates(columns, np.arange(3)) == expected

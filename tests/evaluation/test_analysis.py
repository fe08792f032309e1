"""The error analysis against naive twins, and how often the bootstrap's intervals hold the truth."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from evaluation.analysis import REGIONS, WORD_PIECES, analyse, summary_table
from evaluation.bootstrap import Bootstrap
from evaluation.recall import UNRANKED, ranks, recalls

RNG = np.random.default_rng(3)
IMAGES, TEXTS = 30, 90
DESCRIBED = np.delete(np.arange(IMAGES), [3, 17])  # the other two have no text
IMAGE_OF = RNG.permutation(np.r_[DESCRIBED, RNG.choice(DESCRIBED, TEXTS - len(DESCRIBED))])
LENGTHS, BOXES = RNG.integers(3, 40, TEXTS), np.r_[11:60:7, RNG.integers(11, 60, IMAGES - 7)]
SCORES = RNG.normal(size=(TEXTS, IMAGES)).astype(np.float32)
SCORES[np.arange(TEXTS), IMAGE_OF] += 1.5


def naive_ranks(scores: np.ndarray) -> dict[str, dict[int, float]]:
    """From 1, by text and by image, infinite where no positive was scored."""
    of_text, of_image = {}, {}
    for text, image in enumerate(IMAGE_OF):
        ahead = sum(scores[text, other] >= scores[text, image] for other in range(IMAGES) if other != image)
        of_text[text] = 1 + ahead if scores[text, image] > -np.inf else np.inf
    for image in DESCRIBED:
        best = max(scores[text, image] for text in range(TEXTS) if IMAGE_OF[text] == image)
        ahead = sum(scores[text, image] >= best for text in range(TEXTS) if IMAGE_OF[text] != image)
        of_image[image] = 1 + ahead if best > -np.inf else np.inf
    return {"img": of_text, "txt": of_image}


def listed(share: float) -> np.ndarray:
    """``SCORES`` with all but a share of each text's images left out, its own one too as chance has it."""
    return np.where(np.random.default_rng(4).random(SCORES.shape) < share, SCORES, -np.inf).astype(np.float32)


@pytest.mark.parametrize("scores", [SCORES, np.round(SCORES), listed(0.7), listed(0.2)], ids=["all", "ties", "70 %", "20 %"])
def test_against_a_naive_twin(scores: np.ndarray) -> None:
    result = analyse(ranks(scores, IMAGE_OF), IMAGE_OF, LENGTHS, BOXES)
    expected = naive_ranks(scores)
    for way, found in expected.items():
        values = np.array(list(found.values()))
        median = np.median(values)
        assert result[f"{way}_median_rank"] == (median if median < np.inf else None)
        assert result[f"{way}_mean_reciprocal_rank"] == pytest.approx(np.mean(1 / values))
        assert result["unranked"][way] == np.isinf(values).sum()
    assert sum(part["texts"] for part in result["by_word_pieces"]) == TEXTS
    for part in result["by_word_pieces"]:
        texts = [t for t in range(TEXTS) if part["from"] <= LENGTHS[t] <= (part["to"] or 10**9)]
        assert part["texts"] == len(texts)
        for k in (1, 5, 10):
            assert part[f"img_r{k}"] == pytest.approx(np.mean([expected["img"][t] <= k for t in texts]))
    assert [part["from"] for part in result["by_word_pieces"]] == list(WORD_PIECES)
    for part in result["by_regions"]:
        images = [i for i in DESCRIBED if part["from"] <= BOXES[i] <= (part["to"] or 10**9)]
        texts = [t for t in range(TEXTS) if IMAGE_OF[t] in images]
        assert (part["images"], part["texts"]) == (len(images), len(texts))
        for k in (1, 5, 10):
            assert part[f"txt_r{k}"] == pytest.approx(np.mean([expected["txt"][i] <= k for i in images]))
            assert part[f"img_r{k}"] == pytest.approx(np.mean([expected["img"][t] <= k for t in texts]))
    assert [part["from"] for part in result["by_regions"]] == [first for first in REGIONS if 10 < first < 60]
    assert json.loads(json.dumps(result)) == result


def test_candidates_that_were_not_scored_are_never_found() -> None:
    """Not even where there are fewer images than the cutoff; and they tie with nothing."""
    scores = np.full((4, 4), -np.inf, np.float32)
    scores[0, 0] = scores[1, 0] = 1  # text 1 belongs to image 1, which it was not scored with
    found = ranks(scores, np.arange(4))
    assert found.img.tolist() == [0, UNRANKED, UNRANKED, UNRANKED]
    assert found.txt.tolist() == [1, UNRANKED, UNRANKED, UNRANKED]
    assert found.ties == {"txt": 1, "img": 0}
    assert recalls(found)["img_r10"] == recalls(found)["txt_r10"] == 0.25


def test_intervals_are_those_of_a_naive_bootstrap_of_images() -> None:
    found = ranks(SCORES, IMAGE_OF)
    intervals = analyse(found, IMAGE_OF, LENGTHS, BOXES)["interval_95"]
    measured = recalls(found)
    rng = np.random.default_rng(0)
    statistics: dict[str, list[float]] = {name: [] for name in [*measured, "img_median_rank", "txt_mean_reciprocal_rank"]}
    for _ in range(1000):
        drawn = rng.integers(len(DESCRIBED), size=len(DESCRIBED))
        texts = np.concatenate([np.flatnonzero(DESCRIBED[image] == IMAGE_OF) for image in drawn])
        resampled = found._replace(txt=found.txt[drawn], img=found.img[texts])
        for name, value in recalls(resampled).items():
            statistics[name].append(value)
        statistics["img_median_rank"].append(1 + float(np.median(resampled.img)))
        statistics["txt_mean_reciprocal_rank"].append(float(np.mean(1 / (1 + resampled.txt))))
    for name, values in statistics.items():
        values.sort()
        assert intervals[name] == pytest.approx([values[25], values[-26]]), name
    assert set(intervals) == set(statistics) | {"img_mean_reciprocal_rank", "txt_median_rank"}
    assert analyse(found, IMAGE_OF, LENGTHS, BOXES)["interval_95"] == intervals


@pytest.mark.parametrize("statistic", [Bootstrap.mean, Bootstrap.median], ids=["mean", "median"])
def test_intervals_hold_the_truth_95_times_in_100(statistic: Callable[..., list[float]]) -> None:
    """Five observations a cluster that depend on each other. Whoever takes them for independent is right far less often."""
    rng = np.random.default_rng(6)
    clusters, of_each, worlds = 80, 5, 200
    bootstrap, cluster_of = Bootstrap(clusters, resamples=200), np.arange(clusters).repeat(of_each)
    alone, each = Bootstrap(clusters * of_each, resamples=200), np.arange(clusters * of_each)
    right = naively = 0
    for _ in range(worlds):
        values = 0.5 + (rng.normal(size=(clusters, 1)) + 0.5 * rng.normal(size=(clusters, of_each))).ravel()
        low, high = statistic(bootstrap, values, cluster_of)
        right += low <= 0.5 <= high
        low, high = alone.mean(values, each)
        naively += low <= 0.5 <= high
    assert 0.90 <= right / worlds <= 0.98
    assert naively / worlds < 0.75


def test_statistics_of_every_resample() -> None:
    rng = np.random.default_rng(7)
    values, cluster_of = rng.normal(size=37), rng.integers(0, 9, 37)
    bootstrap = Bootstrap(9, resamples=100)
    assert (bootstrap.times.sum(axis=1) == 9).all()
    means, medians = bootstrap.means(values, cluster_of), bootstrap.medians(values, cluster_of)
    for times, mean, median in zip(bootstrap.times, means, medians, strict=True):
        drawn = values.repeat(times[cluster_of].astype(int))
        assert mean == pytest.approx(drawn.mean())
        assert median == np.median(drawn)


def test_bootstrap_of_one_cluster_or_none_says_nothing() -> None:
    bootstrap = Bootstrap(3)
    assert bootstrap.mean(np.array([1.0, 2.0]), np.array([1, 1])) is None
    assert bootstrap.median(np.array([]), np.array([], int)) is None
    assert bootstrap.mean(np.array([1.0, 2.0]), np.array([0, 2])) == [1, 2]
    assert bootstrap.median(np.array([1.0, 2.0]), np.array([0, 2])) == [1, 2]


def test_table_is_a_few_lines() -> None:
    lines = summary_table(analyse(ranks(SCORES, IMAGE_OF), IMAGE_OF, LENGTHS, BOXES)).splitlines()
    assert len(lines) == 7
    assert len({len(line) for line in lines[:3]}) == 1
    unranked = summary_table(analyse(ranks(listed(0.05), IMAGE_OF), IMAGE_OF, LENGTHS, BOXES))
    assert "∞ – ∞" in unranked

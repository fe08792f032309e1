"""ISDa by hand and against plain loops; the word pieces and regions of an object."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.image_db import Image
from data.sources.entities import Annotated, parse_caption
from data.tokenizer import load_tokenizer
from evaluation.isda import (
    Objects,
    among_objects,
    find_objects,
    isda,
    measure_isda,
    regions_of,
    summary,
    table,
    with_uniform_attention,
)
from evaluation.plots.curves import isda_figure
from model.iais import PairAttention


def members(rows: list[set[int]], count: int) -> np.ndarray:
    return np.array([[index in row for index in range(count)] for row in rows])


def naive_among(attention: np.ndarray, rows: list[set[int]]) -> list[list[float]]:
    """Average over the rows of one object, sum over the columns of another, normalise each row."""
    table = []
    for own in rows:
        masses = [sum(attention[t][u] for t in own for u in other) / len(own) for other in rows]
        table.append([mass / sum(masses) for mass in masses])
    return table


def naive_isda(words: np.ndarray, regions: np.ndarray, pieces: list[set[int]], regions_of: list[set[int]]) -> float:
    total = 0.0
    for a, b in zip(naive_among(words, pieces), naive_among(regions, regions_of), strict=True):
        for p, q in zip(a, b, strict=True):
            total += p * math.log(p / q) + q * math.log(q / p)
    return total / len(pieces)


def test_plain_loops() -> None:
    """Random maps of several heads; objects of several phrases, some of which share regions."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        words, regions, count = (int(rng.integers(low, high)) for low, high in ((5, 12), (5, 12), (2, 5)))
        pair = PairAttention.of_map(torch.from_numpy(rng.normal(size=(3, words + 2 + regions, words + 2 + regions))), words + 2)
        blocks = pair.head_mean()
        pieces = [set(part.tolist()) for part in np.array_split(rng.permutation(words), count + 1)[:count]]
        found = [set(rng.choice(regions, size=int(rng.integers(1, 4))).tolist()) for _ in range(count)]
        measured = measure_isda(pair, Objects(members(pieces, words), members(found, regions)))
        expected = naive_isda(blocks.intra.exp().numpy(), blocks.other.exp().numpy(), pieces, found)
        assert measured["isda"] == pytest.approx(expected)
        disjoint = sum(map(len, found)) == len(set().union(*found))
        assert measured["isda_disjoint"] == pytest.approx(expected if disjoint else math.nan, nan_ok=True)


def test_hardly_any_attention_on_objects() -> None:
    """Masses below the smallest float keep their proportions: e^-2000 to 3 e^-2000 is 1 to 3."""
    logs = torch.tensor([[-2000.0, -2000 + math.log(3), 0], [-2000, -2000, 0], [0, -2000, -2000]], dtype=torch.float64)
    among = among_objects(logs, torch.tensor([[True, False, False], [False, True, False]]))
    np.testing.assert_allclose(among.exp(), [[0.25, 0.75], [0.5, 0.5]])
    scores = torch.zeros(1, 7, 7)
    scores[:, 1:3, 1] = -3e4  # neither word attends to the first, and no region to the last
    scores[:, 4:, 6] = -3e4
    value = isda(PairAttention.of_map(scores, 4).head_mean(), Objects(members([{0}, {1}], 2), members([{1}, {2}], 3)))
    assert float(value) == pytest.approx(6e4)  # in each row, all of one side's attention is where the other has e^-30000


def test_even_attention() -> None:
    """Objects receive attention by their numbers of words and regions: 2 to 1, and 1 to 2; a shared region counts for both."""
    even = with_uniform_attention(PairAttention.of_map(torch.randn(2, 9, 9), 5))
    assert [tuple(block.shape) for block in even.head_mean()] == [(3, 3), (3, 4), (4, 3), (4, 4)]
    value = measure_isda(even, Objects(members([{0, 1}, {2}], 3), members([{0}, {1, 2}], 4)))
    assert value["isda"] == value["isda_disjoint"] == pytest.approx(2 / 3 * math.log(2))
    shared = measure_isda(even, Objects(members([{0, 1}, {2}], 3), members([{0, 1}, {1}], 4)))
    assert shared["isda"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(shared["isda_disjoint"])


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([0.5, 0.9, 0.49, 1.0], [0, 1, 3]),  # 0.5 or more
        ([0.3, 0.45, 0.45, 0.1], [1]),  # the best one, and the first of two
        ([0.3, 0.1, 0.2], [0]),
        ([0.29, 0.1, 0.0], []),
    ],
    ids=str,
)
def test_regions_of_an_object(widths: list[float], expected: list[int]) -> None:
    """Regions of these widths and a box of width 1, so that their IoU is their width; another box, of no area, is elsewhere."""
    image = Image("", np.zeros((len(widths), 1)), np.array([[0, 0, width, 1, 0, 0, 0] for width in widths], np.float64))
    assert np.flatnonzero(regions_of(np.array([[5, 5, 5, 5], [0, 0, 1, 1]], np.float64), image)).tolist() == expected


def test_objects_of_a_caption() -> None:
    """A chain of two phrases, one of several word pieces, and one for each reason to skip a chain."""
    tokenizer = load_tokenizer()
    caption = parse_caption(
        "[/EN#1/other A rhombus] and [/EN#2/other two stars] in [/EN#3/scene the picture] , [/EN#4/other one] far from "
        "[/EN#1/other the rhombus] , [/EN#0/notvisual nothing] [/EN#5/other else] or [/EN#6/other \u200e] ."
    )
    whole, left, upper = [0.0, 0, 1, 1], [0.0, 0, 0.5, 1], [0.0, 0, 1, 0.5]
    boxes = {1: np.array([left]), 2: np.array([left, upper]), 5: np.array([[0.9, 0.9, 1, 1]]), 6: np.array([whole])}
    image = Image("", np.zeros((3, 1)), np.array([[*box, 0, 0, 0] for box in (whole, left, upper)]))
    skipped = dict.fromkeys(("not_visual", "scene", "no_box", "no_region", "no_word_pieces"), 0)
    objects = find_objects(caption, Annotated([caption], boxes, frozenset({3})), image, tokenizer, skipped)
    assert skipped == dict.fromkeys(skipped, 1)
    pieces = np.array(tokenizer.tokens(tokenizer.encode(" ".join(caption.words))))
    rhombus = tokenizer.tokens(tokenizer.encode("rhombus"))
    assert len(rhombus) > 1
    assert pieces[objects.pieces[0]].tolist() == ["A", *rhombus, "the", *rhombus]
    assert pieces[objects.pieces[1]].tolist() == ["two", "stars"]
    assert [np.flatnonzero(row).tolist() for row in objects.regions] == [[0, 1], [0, 1, 2]]
    assert not objects.disjoint


def test_summary_and_plot() -> None:
    """Two layers, one head; one pair lacks the second measure, and the first layer lacks it altogether."""
    values = np.random.default_rng(2).random((40, 2, 2, 2))
    values[:, 0, :, 1] = np.nan
    values[0, :, :, 1] = np.nan
    results = summary(["isda", "isda_disjoint"], values, values[:, 0, 0] + 1, np.arange(40) // 4, [0, 3])
    first, last = results["layers"]
    assert (first["layer"], last["layer"]) == (0, 3)
    assert last["isda"] == pytest.approx(values[:, 1, 0, 0].mean())
    assert last["heads"][0]["isda_disjoint"] == pytest.approx(values[1:, 1, 1, 1].mean())
    assert first["isda_disjoint"] is first["interval_95"]["isda_disjoint"] is None
    low, high = last["interval_95"]["isda"]
    assert low < last["isda"] < high
    of_images = values[:, 1, 0, 0].reshape(10, 4).mean(axis=1)  # the interval resamples images
    assert high - low == pytest.approx(2 * 1.96 * of_images.std() / math.sqrt(10), rel=0.2)
    assert results["even_attention"]["isda"] == pytest.approx(values[:, 0, 0, 0].mean() + 1)
    assert table(results).splitlines()[1].split()[-1] == "–"

    (axes,) = isda_figure(results).axes  # uniform attention lacks the second measure
    assert axes.get_title(loc="left") == "isda"
    assert axes.lines[-1].get_xydata().tolist() == [[0, first["isda"]], [3, last["isda"]]]

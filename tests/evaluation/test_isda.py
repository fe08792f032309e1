"""ISDa by hand, against plain loops, and which word pieces and regions an object has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.image_db import Image
from data.sources.entities import Annotated, parse_caption
from data.tokenizer import load_tokenizer
from evaluation.isda import (
    Measured,
    Objects,
    Tally,
    among_objects,
    evened,
    find_objects,
    isda,
    measure_isda,
    overlaps,
    regions_of,
    summary,
    table,
)
from evaluation.plots.isda_plot import isda_figure
from model.iais import Blocks, PairAttention


def blocks_of(words: Tensor, regions: Tensor) -> Blocks:
    """Blocks of which only the two that ISDa looks at are there."""
    return Blocks(words.log(), torch.empty(0), torch.empty(0), regions.log())


def members(rows: list[set[int]], count: int) -> np.ndarray:
    return np.array([[place in row for place in range(count)] for row in rows])


def naive_among(attention: np.ndarray, rows: list[set[int]]) -> list[list[float]]:
    """Average over the rows of one object, add up over the columns of another, make each row sum to one."""
    table = []
    for own in rows:
        masses = [sum(attention[t][u] for t in own for u in other) / len(own) for other in rows]
        table.append([mass / sum(masses) for mass in masses])
    return table


def naive_isda(words: np.ndarray, regions: np.ndarray, pieces: list[set[int]], found: list[set[int]]) -> float:
    total = 0.0
    for a, b in zip(naive_among(words, pieces), naive_among(regions, found), strict=True):
        for p, q in zip(a, b, strict=True):
            total += p * math.log(p / q) + q * math.log(q / p)
    return total / len(pieces)


def test_by_hand() -> None:
    """Two objects: words 0 and 1, and word 3; region 0, and regions 1 and 2. Word 2 is of none."""
    words = torch.tensor([[0.1, 0.2, 0.5, 0.2], [0.3, 0.2, 0.3, 0.2], [0.25] * 4, [0.1, 0.1, 0.2, 0.6]])
    regions = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
    objects = Objects(members([{0, 1}, {3}], 4), members([{0}, {1, 2}], 3))
    # rows 0.4, 0.2 and 0.2, 0.6 of words; 0.5, 0.5 and 0.4, 0.6 of regions
    expected_words, expected_regions = [[2 / 3, 1 / 3], [1 / 4, 3 / 4]], [[1 / 2, 1 / 2], [2 / 5, 3 / 5]]
    blocks = blocks_of(words, regions)
    assert among_objects(blocks.intra, torch.from_numpy(objects.pieces)).exp().numpy() == pytest.approx(
        np.array(expected_words)
    )
    assert among_objects(blocks.other, torch.from_numpy(objects.regions)).exp().numpy() == pytest.approx(
        np.array(expected_regions)
    )
    # (p - q) log(p / q) in both places of a row: 1/6 log(4/3) - 1/6 log(2/3), and 3/20 (log(8/5) - log(4/5)) with its sign
    assert float(isda(blocks, objects)) == pytest.approx((math.log(2) / 6 + 3 / 20 * (math.log(8 / 5) + math.log(5 / 4))) / 2)


def test_no_distance_from_itself_and_the_same_both_ways() -> None:
    rng = np.random.default_rng(0)
    attention = torch.from_numpy(rng.dirichlet(np.ones(6), size=(2, 6)))
    same, other = members([{0, 1}, {2}, {4, 5}], 6), members([{5}, {1, 2, 3}, {0}], 6)
    assert float(isda(blocks_of(attention[0], attention[0]), Objects(same, same))) == pytest.approx(0)
    one_way = isda(blocks_of(attention[0], attention[1]), Objects(same, other))
    assert float(one_way) == pytest.approx(float(isda(blocks_of(attention[1], attention[0]), Objects(other, same))))
    assert float(one_way) > 0.01


def test_plain_loops() -> None:
    """Random maps of several heads; objects of several phrases, and regions of two objects."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        words, regions, count = (int(rng.integers(low, high)) for low, high in ((5, 12), (5, 12), (2, 5)))
        scores = torch.from_numpy(rng.normal(size=(3, words + 2 + regions, words + 2 + regions)))
        pair = PairAttention.of_map(scores, words + 2)
        blocks = pair.head_mean()
        pieces = [set(part.tolist()) for part in np.array_split(rng.permutation(words), count + 1)[:count]]
        found = [set(rng.choice(regions, size=int(rng.integers(1, 4))).tolist()) for _ in range(count)]
        measured = measure_isda(pair, Objects(members(pieces, words), members(found, regions)))
        expected = naive_isda(blocks.intra.exp().numpy(), blocks.other.exp().numpy(), pieces, found)
        assert measured["isda"] == pytest.approx(expected)
        disjoint = sum(map(len, found)) == len(set().union(*found))
        assert measured["isda_disjoint"] == (pytest.approx(expected) if disjoint else pytest.approx(math.nan, nan_ok=True))


def test_hardly_any_attention_on_objects() -> None:
    """Masses that no floating number can hold keep their proportions: e^-2000 to 3 e^-2000 is 1 to 3."""
    logs = torch.tensor([[-2000.0, -2000 + math.log(3), 0], [-2000, -2000, 0], [0, -2000, -2000]], dtype=torch.float64)
    table = among_objects(logs, torch.tensor([[True, False, False], [False, True, False]]))
    assert table.exp().numpy() == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))
    scores = torch.zeros(1, 7, 7)
    scores[:, 1:3, 1] = -3e4  # neither of the words attends to the first, nor of the regions to the last
    scores[:, 4:, 6] = -3e4
    value = isda(PairAttention.of_map(scores, 4).head_mean(), Objects(members([{0}, {1}], 2), members([{1}, {2}], 3)))
    assert float(value) == pytest.approx(6e4)  # in each row all that one side has is where the other has e^-30000


def test_even_attention() -> None:
    """Words are attended to by their number, and so are regions: 2 to 1, and 1 to 2; one region counts for two objects."""
    even = evened(PairAttention.of_map(torch.randn(2, 9, 9), 5))
    assert [tuple(block.shape) for block in even.head_mean()] == [(3, 3), (3, 4), (4, 3), (4, 4)]
    value = measure_isda(even, Objects(members([{0, 1}, {2}], 3), members([{0}, {1, 2}], 4)))
    assert value["isda"] == value["isda_disjoint"] == pytest.approx(2 / 3 * math.log(2))
    shared = measure_isda(even, Objects(members([{0, 1}, {2}], 3), members([{0, 1}, {1}], 4)))
    assert shared["isda"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(shared["isda_disjoint"])


def test_overlaps() -> None:
    boxes = np.array([[0, 0, 0.5, 1], [0.25, 0, 0.75, 1], [0.5, 0.5, 0.5, 0.5]])
    expected = [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(overlaps(boxes, boxes), expected)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([0.5, 0.9, 0.49, 1.0], [0, 1, 3]),  # from one half on, both ends included
        ([0.3, 0.45, 0.45, 0.1], [1]),  # the best, and the first of two
        ([0.3, 0.1, 0.2], [0]),
        ([0.29, 0.1, 0.2], []),
    ],
    ids=str,
)
def test_regions_of_an_object(widths: list[float], expected: list[int]) -> None:
    """Regions as wide as given beside a box of width 1, so that their IoU is their width."""
    corners = np.array([[0, 0, width, 1] for width in widths], np.float64)
    image = Image("", np.zeros((len(widths), 1)), np.concatenate([corners, np.zeros((len(widths), 3))], axis=1))
    nowhere = [5, 5, 6, 6]
    assert np.flatnonzero(regions_of(np.array([nowhere, [0, 0, 1, 1]], np.float64), image)).tolist() == expected


def test_objects_of_a_caption() -> None:
    """A chain of two phrases, one of several word pieces, and one of each kind that is left out."""
    tokenizer = load_tokenizer()
    caption = parse_caption(
        "[/EN#1/other A rhombus] and [/EN#2/other two stars] in [/EN#3/scene the picture] , [/EN#4/other one] far from "
        "[/EN#1/other the rhombus] , [/EN#0/notvisual nothing] [/EN#5/other else] or [/EN#6/other \u200e] ."
    )
    whole, left, upper = [0.0, 0, 1, 1], [0.0, 0, 0.5, 1], [0.0, 0, 1, 0.5]
    boxes = {1: np.array([left]), 2: np.array([left, upper]), 5: np.array([[0.9, 0.9, 1, 1]]), 6: np.array([whole])}
    regions = np.array([[*box, 0, 0, 0] for box in (whole, left, upper)])
    tally = Tally()
    objects = find_objects(
        caption, Annotated([caption], boxes, frozenset({3})), Image("", np.zeros((3, 1)), regions), tokenizer, tally
    )
    assert tally.chains == {"not_visual": 1, "scene": 1, "no_box": 1, "no_region": 1, "no_word_pieces": 1}
    pieces = np.array(tokenizer.tokens(tokenizer.encode(" ".join(caption.words))))
    rhombus = tokenizer.tokens(tokenizer.encode("rhombus"))
    assert len(rhombus) > 1
    assert pieces[objects.pieces[0]].tolist() == ["A", *rhombus, "the", *rhombus]
    assert pieces[objects.pieces[1]].tolist() == ["two", "stars"]
    assert [np.flatnonzero(row).tolist() for row in objects.regions] == [[0, 1], [0, 1, 2]]
    assert not objects.disjoint


def test_summary_and_plot() -> None:
    """Two layers, one head; the second measure is missing of one pair, and of all in the first layer."""
    rng = np.random.default_rng(2)
    values = rng.random((40, 2, 2, 2))
    values[:, 0, :, 1] = np.nan
    values[0, :, :, 1] = np.nan
    results = summary(Measured(["isda", "isda_disjoint"], values, values[:, 0, 0] + 1, np.arange(40) // 4), [0, 3])
    of_layers = results["layers"]
    assert [entry["layer"] for entry in of_layers] == [0, 3]
    assert of_layers[1]["isda"] == pytest.approx(values[:, 1, 0, 0].mean())
    assert of_layers[1]["heads"][0]["isda_disjoint"] == pytest.approx(values[1:, 1, 1, 1].mean())
    assert of_layers[0]["isda_disjoint"] is None
    assert of_layers[0]["interval_95"]["isda_disjoint"] is None
    low, high = of_layers[1]["interval_95"]["isda"]
    assert low < of_layers[1]["isda"] < high
    of_images = values[:, 1, 0, 0].reshape(10, 4).mean(axis=1)  # images are what varies
    assert high - low == pytest.approx(2 * 1.96 * of_images.std() / math.sqrt(10), rel=0.2)

    assert results["even_attention"]["isda"] == pytest.approx(values[:, 0, 0, 0].mean() + 1)
    assert table(results).splitlines()[1].split()[-1] == "–"

    (first,) = isda_figure(results).axes  # there is no second measure of even attention
    assert first.get_title(loc="left") == "isda"
    line = first.lines[-1]
    assert np.asarray(line.get_xdata()).tolist() == [0, 3]
    assert np.asarray(line.get_ydata()).tolist() == [entry["isda"] for entry in of_layers]

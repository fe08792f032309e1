"""Figures of attention: the right numbers, words and regions in the right cells, whatever a caption holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image as Picture

from data.image_db import Image
from evaluation.plots.pair import pair_figure
from evaluation.plots.regions import TILE, read_picture, tiles_of
from evaluation.plots.style import save_figure
from evaluation.retriever import Attention
from model.iais import Modality
from tests import naive
from tests.scripts.test_visualize import svg_texts
from utils.errors import InputError

HEADS, LAYERS = 3, 2
WORDS = ["a", "red", "star", "##s", "is", "left", "of", "it"]
NAMES: dict[str, list[str]] = {"L": WORDS, "V": list("012345")}  # of the words, and of six regions


def boxes_of(corners: np.ndarray) -> np.ndarray:
    """(K, 4) → (K, 7)."""
    sizes = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners, sizes, sizes.prod(axis=1, keepdims=True)], axis=1).astype(np.float32)


def cells(columns: int, rows: int) -> np.ndarray:
    """The boxes of a chessboard, row by row."""
    x, y = np.meshgrid(np.arange(columns) / columns, np.arange(rows) / rows)
    return boxes_of(np.stack([x, y, x + 1 / columns, y + 1 / rows], axis=-1).reshape(-1, 4))


def chessboard(columns: int, rows: int) -> Picture.Image:
    """A picture in which each of these boxes has a different colour."""
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    return Picture.fromarray(colours.repeat(20, axis=0).repeat(20, axis=1))


def attention(pieces: list[str], boxes: np.ndarray, seed: int = 0, sharpness: float = 2.0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    length = len(pieces) + 2 + len(boxes)
    maps = {layer: sharpness * torch.randn(HEADS, length, length, generator=generator) for layer in range(LAYERS)}
    return Attention(1.5, pieces, Image("made.npz", np.zeros((len(boxes), 4), np.float16), boxes), maps)


@pytest.fixture
def seen() -> Attention:
    return attention(WORDS, cells(3, 2))


def heat_maps(figure: Figure) -> list[tuple[Axes, AxesImage]]:
    """The heat maps of a figure, in the order of drawing."""
    return [(axes, axes.images[0]) for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]


def sides(axes: Axes) -> list[Axes]:
    """A heat map and the strips of tiles along it, which have its labels."""
    return [axes, *(strip for strip in axes.child_axes if strip.images)]


def labels_of(axes: Axes) -> tuple[list[str], list[str]]:
    """The labels of the rows and of the columns."""
    return [label.get_text() for label in axes.get_yticklabels()], [label.get_text() for label in axes.get_xticklabels()]


def naive_blocks(seen: Attention, layer: int = LAYERS - 1, head: int | None = None) -> dict[str, torch.Tensor]:
    maps = [seen.maps[layer][number].double() for number in (range(HEADS) if head is None else [head])]
    return naive.blocks(maps, len(seen.pieces) + 2)


@pytest.mark.parametrize(("layer", "head"), [(-1, None), (0, 2)])
def test_the_blocks_of_a_layer_and_head(seen: Attention, layer: int, head: int | None) -> None:
    drawn = heat_maps(pair_figure({"model": seen}, text="", layer=layer, head=head, views=["blocks"]))
    expected = naive_blocks(seen, layer % LAYERS, head)
    for (axes, image), name in zip(drawn, ("LL", "LV", "VL", "VV"), strict=True):
        np.testing.assert_allclose(image.get_array(), expected[name].numpy(), rtol=1e-4)
        assert image.get_clim()[0] == 0
        assert labels_of(axes) == tuple(NAMES[modality] for modality in name)


@pytest.mark.parametrize(("me", "other", "view"), [("L", "V", "linguistic"), ("V", "L", "visual")])
def test_alignments_and_their_losses(seen: Attention, me: Modality, other: Modality, view: str) -> None:
    figure = pair_figure({"model": seen}, text="", views=[view])
    own, *aligned = heat_maps(figure)
    heading = figure.subfigs[0].texts[-1].get_text()
    blocks = naive_blocks(seen)
    among, across = blocks[other + other], blocks[other + me]
    nearest = [max(range(len(row)), key=row.__getitem__) for row in blocks[me + other].tolist()]
    by_nearest = [[among[i, j] for j in nearest] for i in nearest]
    by_all = [[sum(row[k] * across[k, j] for k in range(len(row))) for j in range(len(nearest))] for row in blocks[me + other]]
    np.testing.assert_allclose(own[1].get_array(), blocks[me + me], rtol=1e-4)
    for expected, (_, image) in zip((by_nearest, by_all), aligned, strict=True):
        np.testing.assert_allclose(image.get_array(), expected, rtol=1e-4)
    maps = [head.double() for head in seen.maps[LAYERS - 1]]
    for kind in naive.ALIGNMENTS:
        values = dict(zip("LV", heading.split(kind)[1].split(), strict=False))
        assert float(values[me]) == pytest.approx(naive.alignment(kind, maps, len(WORDS) + 2, me), rel=1e-3)
    pairs = zip(NAMES[me], nearest, strict=True)
    assert labels_of(aligned[0][0])[0] == [f"{name} {NAMES[other][number]}" for name, number in pairs]


@pytest.mark.parametrize(("columns", "rows", "repeat"), [(4, 3, 1), (10, 10, 7)])
def test_every_region_stands_at_its_row_and_column(columns: int, rows: int, repeat: int) -> None:
    """The tile of each box has its colour, is in line with its cells, and covers no other tile."""
    picture, boxes = chessboard(columns, rows), cells(columns, rows)
    figure = pair_figure({"model": attention(WORDS * repeat, boxes)}, text="", picture=picture, views=["blocks"])
    figure.draw_without_rendering()
    colours = np.asarray(picture)[10::20, 10::20].reshape(-1, 3)
    axes, _ = heat_maps(figure)[3]  # VV
    for strip, side in zip(sides(axes)[1:], (1, 0), strict=True):
        (image,) = strip.images
        pixels, (left, right, bottom, top) = np.asarray(image.get_array()), image.get_extent()
        levels = round(abs(right - left if side else top - bottom))
        for number, colour in enumerate(colours):
            for along in (-0.4, 0, 0.4):
                x, y = (number % levels + 0.5, number + along * levels)[:: 1 if side else -1]
                row, column = (top - y) / (top - bottom) * pixels.shape[0], (x - left) / (right - left) * pixels.shape[1]
                np.testing.assert_allclose(pixels[int(row), int(column), :3], colour, atol=3)
            middle = np.full(2, number)
            np.testing.assert_allclose(strip.transData.transform(middle)[side], axes.transData.transform(middle)[side])
        assert strip.bbox.size[1 - side] / levels / figure.dpi > 0.2  # inches
        assert labels_of(strip)[1 - side] == [str(number) for number in range(len(boxes))]


def test_tiles_of_boxes_without_area_or_beyond_the_edge() -> None:
    picture = chessboard(2, 1)
    corners = np.array([[0.75, 0.5, 0.75, 0.5], [0, 0.3, 1, 0.3], [1, 1, 1, 1], [-0.1, 0, 0.5, 1.1]])
    point, line, corner, half = tiles_of(picture, boxes_of(corners))
    left, right = np.asarray(picture)[0, [0, -1]]
    for tile, colour in ((point, right), (corner, right), (half, left)):
        np.testing.assert_allclose(tile[TILE // 2, TILE // 2, :3], colour, atol=1)
    assert 0 < (line[..., 3] > 0).sum() < TILE**2 / 4


def test_words_of_boxes(seen: Attention) -> None:
    figure = pair_figure({"model": seen}, text="", picture=chessboard(3, 2), views=["boxes"])
    nearest = naive_blocks(seen)["LV"].argmax(dim=1).tolist()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"{region}  {', '.join(word for word, of in zip(WORDS, nearest, strict=True) if of == region)}"
        for region in sorted(set(nearest))
    ]
    assert axes.images[0].get_extent() == [0, 1, 1, 0]
    assert axes.get_aspect() == pytest.approx(2 / 3)
    drawn = [[*patch.get_xy(), patch.get_width(), patch.get_height()] for patch in axes.patches]
    for number, box in enumerate(seen.image.boxes):
        coloured = [patch for patch, place in zip(axes.patches, drawn, strict=True) if np.allclose(place, box[[0, 1, 4, 5]])]
        assert (max(patch.get_linewidth() for patch in coloured) > 2) == (number in nearest)


def test_models_side_by_side(seen: Attention) -> None:
    both = {"before": seen, "after": attention(WORDS, seen.image.boxes, seed=1, sharpness=0.2)}
    figure = pair_figure(both, text="", views=["linguistic"])
    figure.draw_without_rendering()
    drawn = heat_maps(figure)
    assert len({tuple(np.round([axes.bbox.y0, axes.bbox.height], 3)) for axes, _ in drawn}) == 1
    limits = [image.get_clim() for _, image in drawn]
    assert limits[:3] == limits[3:]
    assert limits[0] == limits[2]
    assert limits[0][1] == pytest.approx(max(float(drawn[number][1].get_array().max()) for number in (0, 2, 3, 5)))
    own = heat_maps(pair_figure(both, text="", views=["linguistic"], own_colours=True))
    assert [image.get_clim() for _, image in own] == [(image.get_array().min(), image.get_array().max()) for _, image in own]


HARD = ["$", "$x_1$", "日本", "🙂", "<b>", "&amp;", "ב", "\\frac", "\x07", "\ud800", "\uffff", "_", "%s", "{0}"]


def test_captions_are_drawn_verbatim(tmp_path: Path) -> None:
    caption = "\n".join(["costs $5 or $6", *HARD])
    figure = pair_figure({"$m_1$": attention(HARD, cells(3, 2))}, text=caption, views=("boxes", "linguistic"))
    save_figure(figure, tmp_path / "hard.svg")
    texts = svg_texts(tmp_path / "hard.svg")
    for piece in HARD:
        assert ("\ufffd" if piece in "\x07\ud800\uffff" else piece) in texts
    assert any("costs $5 or $6 $ $x_1$ 日本 🙂 <b> &amp;" in text for text in texts)
    assert "$m_1$" in texts
    save_figure(figure, tmp_path / "hard.png")
    with Picture.open(tmp_path / "hard.png") as picture:
        picture.verify()
    save_figure(figure, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "hard.svg").read_bytes()


@pytest.mark.parametrize(
    ("words", "columns", "rows", "views", "most"),
    [
        (1, 1, 1, ["boxes", "linguistic", "blocks"], 14),
        (3, 5, 2, ["boxes", "linguistic", "visual", "blocks"], 20),
        (20, 6, 6, ["boxes", "linguistic", "blocks"], 25),
        (60, 10, 10, ["blocks"], 40),
        (120, 4, 3, ["linguistic"], 40),
    ],
)
def test_sizes_and_no_label_over_another(words: int, columns: int, rows: int, views: list[str], most: float) -> None:
    seen = attention(["straw"] * words, cells(columns, rows))
    figure = pair_figure({"model": seen}, text="word " * words, picture=chessboard(9, 9), views=views)
    assert figure.get_size_inches().min() > 3
    assert figure.get_size_inches().max() < most
    figure.draw_without_rendering()
    boxes = []
    for axes, _ in heat_maps(figure):
        texts = [
            text for strip in sides(axes) for text in (*strip.get_xticklabels(), *strip.get_yticklabels(), strip.xaxis.label)
        ]
        labels = [label for label in texts if label.get_text()]
        assert len(labels) == sum(axes.images[0].get_array().shape) + 1
        boxes += [axes.bbox.extents, *(label.get_window_extent().extents for label in labels)]
    x1, y1, x2, y2 = np.array(boxes).T
    apart = (x1[:, None] >= x2) | (x1 >= x2[:, None]) | (y1[:, None] >= y2) | (y1 >= y2[:, None])
    assert (apart | np.eye(len(boxes), dtype=bool)).all()


def test_pictures_that_can_and_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save_figure(Figure(), tmp_path / "nowhere/a.png")
    assert not list(tmp_path.iterdir())
    exif = Picture.Exif()
    exif[0x0112] = 6  # a quarter turn
    chessboard(4, 1).save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (20, 80)
    (tmp_path / "not.jpg").write_bytes(b"words")
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:100])
    for name, why in (("none.jpg", "no such file"), ("not.jpg", "not a picture"), ("cut.png", "cannot be read")):
        with pytest.raises(InputError, match=rf"{name}: {why}.*, expected a picture"):
            read_picture(tmp_path / name)

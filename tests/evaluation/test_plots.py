"""Pictures of attention: the right numbers, words and regions in the right places, whatever a caption holds."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image as Picture

from data.image_db import Image
from evaluation.plots.drawing import DPI, save_figure
from evaluation.plots.pictures import pair_figure, pulled_back
from evaluation.plots.regions import TILE, read_picture, tiles_of
from evaluation.retriever import Attention
from model.iais import Modality
from tests import naive
from utils.errors import InputError

HEADS, LAYERS = 3, 2
WORDS = ["a", "red", "star", "##s", "is", "left", "of", "it"]


def boxes_of(corners: np.ndarray) -> np.ndarray:
    """(K, 4) → (K, 7)."""
    sizes = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners, sizes, sizes.prod(axis=1, keepdims=True)], axis=1).astype(np.float32)


def cells(columns: int, rows: int) -> np.ndarray:
    """The boxes of a chessboard, row by row."""
    x, y = np.meshgrid(np.arange(columns) / columns, np.arange(rows) / rows)
    corners = np.stack([x, y, x + 1 / columns, y + 1 / rows], axis=-1).reshape(-1, 4)
    return boxes_of(corners)


def chessboard(columns: int, rows: int) -> Picture.Image:
    """A picture whose every such box has a colour of its own."""
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    return Picture.fromarray(colours.repeat(20, axis=0).repeat(20, axis=1))


def attention(pieces: list[str], boxes: np.ndarray, seed: int = 0, sharpness: float = 2.0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    length = len(pieces) + 2 + len(boxes)
    maps = {layer: sharpness * torch.randn(HEADS, length, length, generator=generator) for layer in range(LAYERS)}
    return Attention(1.5, pieces, Image("made.npz", np.zeros((len(boxes), 4), np.float16), boxes), maps)


def heat(figure: Figure) -> list[tuple[Axes, AxesImage]]:
    """The maps of a figure, in the order of drawing."""
    return [(axes, axes.images[0]) for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]


def pixels(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return np.asarray(Picture.open(file).convert("RGB"))


def texts_of_svg(figure: Figure, path: Path) -> list[str]:
    save_figure(figure, path)
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def naive_blocks(seen: Attention, layer: int, head: int | None) -> dict[str, torch.Tensor]:
    maps = [seen.maps[layer][number].double() for number in (range(HEADS) if head is None else [head])]
    return naive.blocks(maps, len(seen.pieces) + 2)


@pytest.mark.parametrize("modality", ["L", "V"])
def test_pull_back(modality: Modality) -> None:
    seen = attention(WORDS, cells(3, 2))
    back = pulled_back(seen.blocks(), modality)
    cut = naive_blocks(seen, LAYERS - 1, None)
    me, other = ("L", "V") if modality == "L" else ("V", "L")
    cross, among, across = cut[me + other], cut[other + other], cut[other + me]
    nearest = [max(range(len(row)), key=lambda j, row=row: row[j]) for row in cross.tolist()]
    assert back.nearest.tolist() == nearest
    for i in range(len(cross)):
        for j in range(len(cross)):
            assert float(back.singular[i, j]) == pytest.approx(float(among[nearest[i], nearest[j]]), rel=1e-5)
            by_all = sum(float(cross[i, k] * across[k, j]) for k in range(cross.shape[1]))
            assert float(back.distributed[i, j]) == pytest.approx(by_all, rel=1e-5)


@pytest.mark.parametrize(("layer", "head"), [(-1, None), (0, 2)])
def test_the_blocks_of_a_layer_and_head(layer: int, head: int | None) -> None:
    seen = attention(WORDS, cells(3, 2))
    drawn = heat(pair_figure({"model": seen}, text="", layer=layer, head=head, views=["blocks"]))
    cut = naive_blocks(seen, layer % LAYERS, head)
    for (_, image), name in zip(drawn, ("LL", "LV", "VL", "VV"), strict=True):
        np.testing.assert_allclose(image.get_array(), cut[name].numpy(), rtol=1e-4)
        assert image.get_clim()[0] == 0


@pytest.mark.parametrize("modality", ["L", "V"])
def test_distances_are_the_losses(tmp_path: Path, modality: str) -> None:
    seen = attention(WORDS, cells(3, 2))
    figure = pair_figure({"model": seen}, text="", views=["linguistic" if modality == "L" else "visual"])
    texts = "\n".join(texts_of_svg(figure, tmp_path / "a.svg"))
    maps = [head.double() for head in seen.maps[LAYERS - 1]]
    for kind in ("singular", "distributed"):
        assert f"distance {naive.alignment(kind, maps, len(WORDS) + 2, modality):.4f}" in texts


@pytest.mark.parametrize(("columns", "rows"), [(4, 3), (8, 5)])
def test_every_region_stands_at_its_row_and_column(columns: int, rows: int) -> None:
    """In the file itself: the colour of each box, at the middle of a tile that is in line with the box's cells."""
    picture, boxes = chessboard(columns, rows), cells(columns, rows)
    words = WORDS * (1 if rows == 3 else 4)
    figure = pair_figure({"model": attention(words, boxes)}, text="", picture=picture, views=["blocks"])
    drawn = pixels(figure)
    colours = np.asarray(picture)[10::20, 10::20].reshape(-1, 3)
    axes, heat_map = heat(figure)[3]  # VV
    tiles = [image for image in axes.images if image.get_array().shape[:2] == (TILE, TILE)]
    left, right, _, top = heat_map.get_extent()
    cell = (right - left) / len(boxes)
    assert len(tiles) == 2 * len(boxes)
    for number in range(len(boxes)):
        for tile, middle, side in ((tiles[number], top, 1), (tiles[len(boxes) + number], left, 0)):
            x1, x2, y2, y1 = tile.get_extent()
            centre = (x1 + x2) / 2, (y1 + y2) / 2
            assert centre[side] == pytest.approx(middle + (number + 0.5) * cell)
            assert centre[1 - side] < (left, top)[1 - side]
            x, y = axes.transData.transform(centre) * DPI / figure.dpi
            np.testing.assert_allclose(drawn[len(drawn) - 1 - int(y), int(x)], colours[number], atol=3)


def test_tiles_do_not_overlap() -> None:
    boxes = cells(10, 10)
    figure = pair_figure({"model": attention(WORDS * 7, boxes)}, text="", picture=chessboard(10, 10), views=["blocks"])
    axes, _ = heat(figure)[3]
    extents = np.array([i.get_extent() for i in axes.images if i.get_array().shape[:2] == (TILE, TILE)])
    x1, x2, y2, y1 = extents.T
    apart = (x1[:, None] >= x2) | (x1 >= x2[:, None]) | (y1[:, None] >= y2) | (y1 >= y2[:, None])
    assert (apart | np.eye(len(extents), dtype=bool)).all()
    assert (x2 - x1).min() > 0.25  # inches
    assert figure.get_size_inches().max() < 25


def test_tiles_of_boxes_without_area_or_beyond_the_edge() -> None:
    picture = chessboard(2, 1)
    corners = np.array([[0.75, 0.5, 0.75, 0.5], [0, 0.3, 1, 0.3], [1, 1, 1, 1], [-0.1, 0, 0.5, 1.1]])
    point, line, corner, half = tiles_of(picture, boxes_of(corners))
    left, right = np.asarray(picture)[0, [0, -1]]
    for tile, colour in ((point, right), (corner, right), (half, left)):
        np.testing.assert_allclose(tile[TILE // 2, TILE // 2, :3], colour, atol=1)
    assert 0 < (line[..., 3] > 0).sum() < TILE**2 / 4


def test_words_of_boxes(tmp_path: Path) -> None:
    seen = attention(WORDS, cells(3, 2))
    figure = pair_figure({"model": seen}, text="", picture=chessboard(3, 2), views=["boxes"])
    nearest = naive_blocks(seen, LAYERS - 1, None)["LV"].argmax(dim=1).tolist()
    texts = texts_of_svg(figure, tmp_path / "a.svg")
    for region in set(nearest):
        assert ", ".join(word for word, of in zip(WORDS, nearest, strict=True) if of == region) in texts
    axes = next(axes for axes in figure.axes if axes.images)
    x1, x2, y2, y1 = axes.images[0].get_extent()
    assert (x2 - x1) / (y2 - y1) == pytest.approx(3 / 2)
    drawn = {tuple(np.round([*p.get_xy(), p.get_width(), p.get_height()], 4)) for p in axes.patches if isinstance(p, Rectangle)}
    for box in seen.image.boxes:
        scaled = box[[0, 1, 4, 5]] * np.tile([x2 - x1, y2 - y1], 2)
        assert any(np.allclose(scaled, other, atol=1e-3) for other in drawn)


def test_models_side_by_side() -> None:
    boxes = cells(3, 2)
    both = {"before": attention(WORDS, boxes), "after": attention(WORDS, boxes, seed=1, sharpness=0.2)}
    drawn = heat(pair_figure(both, text="", views=["linguistic"]))
    tops = {round(axes.transData.transform((0, image.get_extent()[3]))[1], 3) for axes, image in drawn}
    assert len(tops) == 1
    limits = [image.get_clim() for _, image in drawn]
    assert limits[:3] == limits[3:]
    assert limits[0] == limits[2]
    assert limits[0][1] == pytest.approx(max(float(drawn[place][1].get_array().max()) for place in (0, 2, 3, 5)))
    own = heat(pair_figure(both, text="", views=["linguistic"], own_colours=True))
    assert [image.get_clim() for _, image in own] == [(image.get_array().min(), image.get_array().max()) for _, image in own]


HARD = ["$", "$x_1$", "日本", "🙂", "<b>", "&amp;", "ב", "\\frac", "\x07", "\ud800", "\uffff", "_", "%s", "{0}"]


def test_captions_are_drawn_as_they_are(tmp_path: Path) -> None:
    caption = "\n".join(["costs $5 or $6", *HARD])
    figure = pair_figure({"$m_1$": attention(HARD, cells(3, 2))}, text=caption, views=("boxes", "linguistic"))
    texts = texts_of_svg(figure, tmp_path / "hard.svg")
    for piece in HARD:
        assert ("\ufffd" if piece in "\x07\ud800\uffff" else piece) in texts
    assert any("costs $5 or $6 $ $x_1$ 日本 🙂 <b> &amp;" in text for text in texts)
    assert "$m_1$" in texts
    save_figure(figure, tmp_path / "hard.png")
    with Picture.open(tmp_path / "hard.png") as picture:
        assert picture.size == tuple((figure.get_size_inches() * DPI).astype(int))
    again = tmp_path / "again.svg"
    save_figure(figure, again)
    assert again.read_bytes() == (tmp_path / "hard.svg").read_bytes()


@pytest.mark.parametrize(("words", "columns", "rows", "most"), [(1, 1, 1, 12), (60, 10, 10, 40), (120, 4, 3, 40)])
def test_sizes(words: int, columns: int, rows: int, most: float) -> None:
    figure = pair_figure({"model": attention(["word"] * words, cells(columns, rows))}, text="word " * words)
    width, height = figure.get_size_inches()
    assert 3 < width < most
    assert 3 < height < most


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.pdf: expected a file name that ends in \.png or \.svg"):
        save_figure(Figure(), tmp_path / "a.pdf")
    with pytest.raises(InputError, match="cannot be written"):
        save_figure(Figure(), tmp_path / "nowhere/a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"none\.jpg: cannot be read as a picture \(No such file"):
        read_picture(tmp_path / "none.jpg")
    (tmp_path / "not.jpg").write_bytes(b"words")
    with pytest.raises(InputError, match=r"not\.jpg: cannot be read as a picture"):
        read_picture(tmp_path / "not.jpg")
    chessboard(9, 9).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut\.png: cannot be read as a picture"):
        read_picture(tmp_path / "cut.png")


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    exif = Picture.Exif()
    exif[0x0112] = 6  # a quarter turn
    chessboard(4, 1).save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (20, 80)

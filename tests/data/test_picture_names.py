"""Pictures are found from the names that image databases give their features."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.picture_names import find_pictures
from utils.errors import InputError


def test_pictures_are_found_by_the_names_of_their_features(tmp_path: Path) -> None:
    pictures = {
        "flickr30k_001000092795.npz": "1000092795.jpg",
        "coco_val2014_000000000042.npz": "val2014/COCO_val2014_000000000042.jpg",
        "coco_val2014_000000391895.npz": "COCO_val2014_000000391895.jpg",
        "scenes_000000000003.npz": "own/scenes_000000000003.PNG",
    }
    for name in (*pictures.values(), "own/scenes_000000000003.txt", "cat.jpeg", "x_3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures(tmp_path, {*pictures, "bird.npz"})
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == pictures
    with pytest.raises(InputError, match=r"no picture of any of 1 image found; expected one for 'fox\.npz'"):
        find_pictures(tmp_path, {"fox.npz"})
    (tmp_path / "scenes_000000000003.jpg").touch()
    with pytest.raises(InputError, match=r"both would be image 'scenes_000000000003\.npz'"):
        find_pictures(tmp_path, pictures)

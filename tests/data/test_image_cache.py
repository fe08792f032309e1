"""Images held in memory make the same halves as images read for each."""

from __future__ import annotations

import pytest
import torch

from data.datasets import HardNegativeDataset
from data.image_cache import ImageCache
from data.loader import Loader
from tests.conftest import CPU, Golden


@pytest.mark.parametrize("sources", [1, 2], ids=["one source", "two sources with the same names"])
def test_halves_are_the_same(bundled: Golden, sources: int) -> None:
    opened = [bundled.source() for _ in range(sources)]
    task = HardNegativeDataset(opened, negative_size=5, micro_steps=6, micro_steps_per_pass=3, seed=2)
    expected = [task[number] for number in range(len(task))]
    cache = ImageCache.of(opened, Loader(CPU), 1 << 30)
    assert cache is not None
    assert len(cache.features.lengths) == sources * 40
    task.without_images = True
    for number, half in enumerate(expected):
        bare = task[number]
        assert len(bare.batch.features.rows) == 0
        filled = cache.fill(bare)
        assert filled.batch.image_names == half.batch.image_names
        assert torch.equal(filled.batch.features.rows, half.batch.features.rows)
        assert torch.equal(filled.batch.features.lengths, half.batch.features.lengths)
        assert torch.equal(filled.batch.boxes, half.batch.boxes)
        assert torch.equal(filled.batch.pairs, half.batch.pairs)


def test_too_many_images_are_not_held(bundled: Golden) -> None:
    source = bundled.source()
    size = sum(source.image_db[name].features.nbytes + source.image_db[name].boxes.nbytes for name in source.image_names)
    assert ImageCache.of([source], Loader(CPU), size) is not None
    assert ImageCache.of([source], Loader(CPU), size - 1) is None
    assert ImageCache.of([source], Loader(CPU), 0) is None

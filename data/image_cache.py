"""All images of a training in memory, on the device, so that a half brings its texts alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Half, PairBatch, Ragged
from data.loader import Loader
from data.tasks import BlockTask, PairSource

IMAGES_PER_BLOCK = 256
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageCache:
    """The images of some sources, one source's behind the other's, as a ``PairBatch`` has them.

    Attributes:
        features: rows (all regions, F), as stored, on the device.
        boxes: (all regions, 7) float32, on the device.
    """

    features: Ragged
    boxes: Tensor

    @classmethod
    def of(cls, sources: Sequence[PairSource], loader: Loader, limit: float) -> ImageCache | None:
        """Read all images of ``sources``, unless they take more than ``limit`` bytes: then None.

        Raises:
            InputError: a record that cannot be read.
        """
        blocks: list[PairBatch] = []
        size, left = 0, sum(len(source.image_names) for source in sources)
        for source in sources if limit > 0 else ():
            for batch in loader(BlockTask(source, "images", IMAGES_PER_BLOCK)):
                blocks.append(batch)
                size += batch.features.rows.nbytes + batch.boxes.nbytes
                left -= len(batch.image_names)
                if size + left * size / sum(len(block.image_names) for block in blocks) > limit:
                    return None
        if not blocks:
            return None
        LOGGER.info("the training images are held in memory, %.2f GiB", size / 2**30)
        features = Ragged(
            torch.cat([block.features.rows for block in blocks]), torch.cat([block.features.lengths for block in blocks])
        )
        return cls(features, torch.cat([block.boxes for block in blocks]))

    def fill(self, half: Half) -> Half:
        """``half``, which came without them, with its images."""
        assert half.images is not None
        rows = self.features.row_indices(half.images).to(self.boxes.device)
        features = Ragged(self.features.rows.index_select(0, rows), self.features.lengths[half.images])
        return half._replace(batch=replace(half.batch, features=features, boxes=self.boxes[rows]))

"""All images of a training in memory, on the device, so that only texts are read for each half of a micro-step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import AnchorBatch, Ragged
from data.datasets import BlockDataset
from data.loader import Loader
from data.split import RetrievalSplit

IMAGES_PER_BLOCK = 256
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageCache:
    """The images of some splits, one split after the other.

    Attributes:
        features: rows (all regions, F), as stored, on the device.
        boxes: (all regions, 7) float32, on the device.
    """

    features: Ragged
    boxes: Tensor

    @classmethod
    def of(cls, splits: Sequence[RetrievalSplit], loader: Loader, limit: float) -> ImageCache | None:
        """Read all images of ``splits``; return None if they may take more than ``limit`` bytes or are of mixed types."""
        most = sum(split.image_db.most_boxes(split.image_names) for split in splits)
        features = boxes = torch.empty(0)
        lengths: list[Tensor] = []
        filled = 0
        for split in splits if limit > 0 else ():
            for batch in loader(BlockDataset(split, "images", IMAGES_PER_BLOCK)):
                rows = batch.features.rows
                if not lengths:
                    if most * (rows[0].nbytes + batch.boxes[0].nbytes) > limit:
                        return None
                    features, boxes = rows.new_empty(most, *rows.shape[1:]), batch.boxes.new_empty(most, 7)
                if rows.dtype != features.dtype:
                    return None
                features[filled : filled + len(rows)] = rows
                boxes[filled : filled + len(rows)] = batch.boxes
                filled += len(rows)
                lengths.append(batch.features.lengths)
        if not lengths:
            return None
        LOGGER.info("the training images are held in memory, %.2f GiB", (features.nbytes + boxes.nbytes) / 2**30)
        return cls(Ragged(features[:filled], torch.cat(lengths)), boxes[:filled])

    def fill(self, half: AnchorBatch) -> AnchorBatch:
        """Add the images to a ``half`` that came without them."""
        assert half.images is not None
        rows = self.features.row_indices(half.images).to(self.boxes.device)
        if self.boxes.device.type == "cpu":  # NumPy asks for huge pages and is twice as fast
            regions = torch.from_numpy(self.features.rows.numpy().take(rows.numpy(), axis=0))
        else:
            regions = self.features.rows.index_select(0, rows)
        features = Ragged(regions, self.features.lengths[half.images])
        return half._replace(batch=replace(half.batch, features=features, boxes=self.boxes[rows]))

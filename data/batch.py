"""The one batch type: distinct texts, distinct images, and the (text, image) pairs to score.

Shapes: T texts, I images, P pairs; N tokens per text with [CLS] and [SEP]; K regions per image; F feature width;
G groups (one anchor each) of C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.image_db import Image
from data.text_db import Text
from utils.errors import InputError, counted


class InputLimits(NamedTuple):
    """What a model accepts: word-piece ids below ``vocab_size``, ``max_positions`` tokens, features ``img_dim`` wide."""

    vocab_size: int
    max_positions: int
    img_dim: int


@dataclass(frozen=True)
class Ragged:
    """Items of different lengths, concatenated so that nothing is padded.

    Attributes:
        rows: (sum of lengths, …), on any device.
        lengths: (items,) int64, always on the CPU, where batches are planned.
    """

    rows: Tensor
    lengths: Tensor

    def positions(self) -> Tensor:
        """Return 0, 1, … within each item, (rows,), on the CPU."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(int(self.lengths.sum())) - starts.repeat_interleave(self.lengths)

    def row_indices(self, items: Tensor) -> Tensor:
        """Return the indices of the rows of ``items``, (sum of their lengths,), on the CPU."""
        lengths, starts = self.lengths[items], self.lengths.cumsum(0) - self.lengths
        return starts[items].repeat_interleave(lengths) + replace(self, lengths=lengths).positions()


@dataclass(frozen=True)
class PairBatch:
    """What is scored together; each text and image occurs once, however many pairs it is in.

    Attributes:
        text_ids: T ids.
        image_names: I names.
        tokens: rows int64 (sum of N,), with [CLS] first and [SEP] last in each text.
        features: rows (sum of K, F), as stored, usually float16.
        boxes: (sum of K, 7) float32, x1 y1 x2 y2 w h w·h in [0, 1], one row per row of ``features``.
        pairs: (P, 2) int64 on the CPU, index of the text and of the image.
    """

    text_ids: tuple[str, ...]
    image_names: tuple[str, ...]
    tokens: Ragged
    features: Ragged
    boxes: Tensor
    pairs: Tensor

    def to(self, device: torch.device) -> PairBatch:
        """Copy the rows to ``device``; lengths and pairs stay on the CPU."""
        return self._map_rows(lambda rows: rows.to(device, non_blocking=True))

    def pin_memory(self) -> PairBatch:
        """Copy the rows to page-locked memory, from which a GPU reads asynchronously."""
        return self._map_rows(lambda rows: rows.pin_memory())

    def select(self, pairs: Tensor) -> PairBatch:
        """Return the batch of these (P', 2) pairs, with only the texts and images that occur in them."""
        texts, text_of = pairs[:, 0].unique(return_inverse=True)
        images, image_of = pairs[:, 1].unique(return_inverse=True)
        regions = self.features.row_indices(images).to(self.boxes.device)
        words = self.tokens.row_indices(texts).to(self.tokens.rows.device)
        return PairBatch(
            text_ids=tuple(self.text_ids[i] for i in texts.tolist()),
            image_names=tuple(self.image_names[i] for i in images.tolist()),
            tokens=Ragged(self.tokens.rows[words], self.tokens.lengths[texts]),
            features=Ragged(self.features.rows[regions], self.features.lengths[images]),
            boxes=self.boxes[regions],
            pairs=torch.stack([text_of, image_of], dim=1),
        )

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        tokens, features = (replace(item, rows=change(item.rows)) for item in (self.tokens, self.features))
        return replace(self, tokens=tokens, features=features, boxes=change(self.boxes))


class AnchorBatch(NamedTuple):
    """One half (image-anchored or text-anchored) of one or more micro-steps: G anchors, each with C candidates.

    ``batch.pairs`` (G · C, 2) is the concatenation of the groups, each with its positive first. If the features were left out,
    ``images`` (I,), on the CPU, has each image's index among those of all splits.
    """

    anchor: Literal["image", "text"]
    batch: PairBatch
    groups: int
    images: Tensor | None = None

    def to(self, device: torch.device) -> AnchorBatch:
        """Copy the batch to ``device``."""
        return self._replace(batch=self.batch.to(device))

    def pin_memory(self) -> AnchorBatch:
        """Copy the batch to page-locked memory."""
        return self._replace(batch=self.batch.pin_memory())


def collate(
    texts: Sequence[Text], images: Sequence[Image], pairs: Tensor, *, cls_id: int, sep_id: int, limits: InputLimits
) -> PairBatch:
    """Make the batch of ``pairs`` (P, 2), indices into ``texts`` and ``images``; either list may be empty.

    Raises ``InputError`` if a text is too long or an image has features of another width; the vocabulary is checked before.
    """
    for text in texts:
        check_length(text.id, len(text.input_ids), limits)
    for image in images:
        width = image.features.shape[1]
        if width != limits.img_dim:
            raise InputError(
                f"image {image.name!r} has features of width {width}, the model has img_dim {limits.img_dim}; use features of "
                "the detector that the model was trained on"
            )
    tokens = [np.concatenate([[cls_id], text.input_ids, [sep_id]]) for text in texts]
    return PairBatch(
        text_ids=tuple(text.id for text in texts),
        image_names=tuple(image.name for image in images),
        tokens=_ragged(tokens, np.empty(0, np.int64)),
        features=_ragged([image.features for image in images], np.empty((0, limits.img_dim), np.float16)),
        boxes=_ragged([image.boxes for image in images], np.empty((0, 7), np.float32)).rows,
        pairs=pairs,
    )


def check_length(text_id: str, length: int, limits: InputLimits) -> None:
    """Raise ``InputError`` if a text of ``length`` word pieces does not fit the position table."""
    if length + 2 > limits.max_positions:
        raise InputError(
            f"text {text_id!r} has {counted(length, 'word piece')}, expected at most {limits.max_positions - 2}: "
            f"max_position_embeddings {limits.max_positions} less [CLS] and [SEP]"
        )


def _ragged(items: list[np.ndarray], empty: np.ndarray) -> Ragged:
    rows = np.concatenate(items) if items else empty
    return Ragged(torch.from_numpy(rows), torch.tensor([len(item) for item in items], dtype=torch.int64))

"""What is scored together: training halves, and blocks of texts or images for evaluation. Everything becomes a PairBatch.

A task maps a number to a batch and has no state: what a half holds is a function of (seed, worker, number).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import AnchorBatch, PairBatch
from data.neighbours import Neighbours
from data.split import RetrievalSplit, read_pairs
from utils.errors import InputError
from utils.files import short_repr

MAX_TXT_LEN = 60  # the published recipes train on texts of at most this many word pieces
LOGGER = logging.getLogger(__name__)
Anchor = Literal["image", "text"]


class HardNegativeDataset(Dataset[AnchorBatch]):
    """The halves of training in their order: image-anchored, text-anchored, image-anchored, …

    Batch 2p and 2p + 1 are those of the ``micro_steps_per_pass`` micro-steps of pass p. Each kind of half walks through its
    own shuffle of this rank's texts, epoch after epoch. Negatives are drawn uniformly, without repetition, from the
    positive's own databases: other images, or texts of this rank that belong to other images. Where an image has
    ``neighbours``, these, or a text of each, come first among them, as many as there is room for, and in the shuffle a text of
    each follows: what can be said of such images and texts by themselves then cancels out of an update's gradient, as far as
    the texts pair off, and what is left is how they go together (Yuksekgonul et al. 2023, NegCLIP, batch such images likewise).

    Args:
        micro_steps: of the whole training, on this worker.
        rank, world_size: this rank holds every ``world_size``-th text.
        neighbours: by image, names of images that are always among its negatives; those of other databases do not count.

    Attributes:
        without_images: leave their features out of the halves, which an ``ImageCache`` then fills.

    Raises:
        InputError: too few images or texts for ``negative_size``, databases that disagree about [CLS] and [SEP], or
            ``neighbours`` of other images alone.
    """

    def __init__(
        self,
        sources: Sequence[RetrievalSplit],
        *,
        negative_size: int,
        micro_steps: int,
        micro_steps_per_pass: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        neighbours: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self.sources = list(sources)
        self.without_images = False
        self.negative_size = negative_size
        self.micro_steps_per_pass = micro_steps_per_pass
        self.passes = micro_steps // micro_steps_per_pass
        self.seed, self.rank = seed, rank
        self.texts = [source.texts[rank::world_size] for source in self.sources]  # of this rank, places in text_db.ids
        self.of_images = [  # their numbers, one image's behind the other's, and where those of each image begin
            _grouped(source.image_of[texts], len(source.image_names))
            for source, texts in zip(self.sources, self.texts, strict=True)
        ]
        for source, texts, (_, starts) in zip(self.sources, self.texts, self.of_images, strict=True):
            self._check(source, len(texts), int(np.diff(starts).max()), world_size)
        self.neighbours = [
            Neighbours(neighbours, source.text_db.image_index, *of_images)
            for source, of_images in zip(self.sources, self.of_images, strict=True)
        ]
        if neighbours and not any(self.neighbours):
            raise InputError(
                f"neighbours: has {short_repr(next(iter(neighbours)))} and the like, expected images of the training databases, "
                f"like {short_repr(self.sources[0].image_names[0])}"
            )
        counts = [len(source.image_names) for source in self.sources]
        self.first_image = dict(zip(self.sources, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self.bounds = np.cumsum([len(texts) for texts in self.texts])
        self._shuffled: dict[Anchor, tuple[int, np.ndarray]] = {}  # the shuffle last used, with its epoch

    def __len__(self) -> int:
        return 2 * self.passes

    def anchor_batches_after(self, micro_steps: int) -> range:
        """The numbers of the halves that are left after so many micro-steps."""
        return range(2 * (micro_steps // self.micro_steps_per_pass), len(self))

    def __getitem__(self, number: int) -> AnchorBatch:
        index, kind = divmod(number, 2)
        anchor: Anchor = "image" if kind == 0 else "text"
        steps = range(index * self.micro_steps_per_pass, (index + 1) * self.micro_steps_per_pass)
        pairs = [pair for step in steps for pair in self.candidates(anchor, step)]
        half = AnchorBatch(anchor, read_pairs(pairs, without_images=self.without_images), self.micro_steps_per_pass)
        if not self.without_images:
            return half
        distinct = dict.fromkeys((source, name) for source, _, name in pairs)  # in the batch's order
        numbers = [self.first_image[source] + source.text_db.image_index[name] for source, name in distinct]
        return half._replace(images=torch.tensor(numbers))

    def candidates(self, anchor: Anchor, step: int) -> list[tuple[RetrievalSplit, str, str]]:
        """The (source, text id, image name) of one half of micro-step ``step``, the positive first."""
        epoch, position = divmod(step, int(self.bounds[-1]))
        if self._shuffled.get(anchor, (None,))[0] != epoch:
            self._shuffled[anchor] = epoch, self._shuffle(anchor, epoch)
        number, text = self._located(int(self._shuffled[anchor][1][position]))
        source, texts, near = self.sources[number], self.texts[number], self.neighbours[number]
        ids, names = source.text_db.ids, source.image_names
        image = int(source.image_of[texts[text]])
        rng = self._rng(anchor, 1, step)
        if anchor == "image":
            numbers, starts = self.of_images[number]
            own = numbers[starts[image] : starts[image + 1]]
            drawn = self._drawn(rng, len(texts), own, near.texts_like(text, image))
            others = [(ids[place], names[image]) for place in texts[drawn]]
        else:
            drawn = self._drawn(rng, len(names), np.array([image]), near.images(image))
            others = [(ids[texts[text]], names[place]) for place in drawn]
        return [(source, *pair) for pair in [(ids[texts[text]], names[image]), *others]]

    def _located(self, example: int) -> tuple[int, int]:
        """Which source this rank's text ``example`` is of, and which it is among the worker's texts there."""
        number = int(np.searchsorted(self.bounds, example, side="right"))
        return number, example - int(self.bounds[number]) + len(self.texts[number])

    def _shuffle(self, anchor: Anchor, epoch: int) -> np.ndarray:
        """All texts in random order, those of neighbours moved up behind the first of them."""
        order = self._rng(anchor, 0, epoch).permutation(int(self.bounds[-1]))
        if not any(self.neighbours):
            return order
        moved: dict[int, None] = {}  # ordered, and a text stays where it came first
        for example in order.tolist():
            if example not in moved:
                number, text = self._located(example)
                image = int(self.sources[number].image_of[self.texts[number][text]])
                like = self.neighbours[number].texts_like(text, image) + (example - text)
                moved.update(dict.fromkeys([example, *like.tolist()]))
        return np.array(list(moved))

    def _drawn(self, rng: np.random.Generator, total: int, own: np.ndarray, near: np.ndarray) -> np.ndarray:
        """``negative_size`` different numbers below ``total``, none among ``own``, with ``near`` or some of it first."""
        if len(near) > self.negative_size:
            near = rng.choice(near, size=self.negative_size, replace=False)
        others = draw_others(rng, total, np.sort(np.concatenate([own, near])), self.negative_size - len(near))
        return np.concatenate([near, others])

    def _rng(self, anchor: Anchor, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, anchor == "text", purpose, number])

    def _check(self, source: RetrievalSplit, texts: int, most: int, world_size: int) -> None:
        path, specials = source.text_db.path, (source.text_db.cls_id, source.text_db.sep_id)
        first = self.sources[0].text_db
        if specials != (first.cls_id, first.sep_id):
            raise InputError(f"{path}: [CLS] and [SEP] are {specials}, {first.path} has {(first.cls_id, first.sep_id)}")
        if len(source.image_names) <= self.negative_size:
            raise InputError(f"{path}: {len(source.image_names)} images, expected more than negative_size {self.negative_size}")
        if texts - most < self.negative_size:
            raise InputError(
                f"{path}: {texts} texts for each of {world_size} ranks within max_txt_len, {most} of them of one image, "
                f"expected negative_size {self.negative_size} of other images"
            )


def _grouped(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """0, 1, … sorted by their ``groups``, numbers below ``count``, and the bounds of each group, (count + 1,)."""
    order = groups.argsort(kind="stable").astype(np.int32)
    return order, np.searchsorted(groups[order], np.arange(count + 1))


def draw_others(rng: np.random.Generator, total: int, excluded: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """``count`` different numbers below ``total``, uniformly among those that are not in ``excluded``, which is sorted."""
    drawn = rng.choice(total - len(excluded), size=count, replace=False)
    for number in excluded:
        drawn += drawn >= number
    return drawn


class BlockDataset(Dataset[PairBatch]):
    """All texts of a source, or all its images, ``size`` at a time; or ``names``, some of them."""

    def __init__(
        self, source: RetrievalSplit, kind: Literal["texts", "images"], size: int, names: Sequence[str] | None = None
    ) -> None:
        self.source = source
        self.kind = kind
        self.size = size
        everything = source.text_db.ids if kind == "texts" else source.image_names
        self.names = everything if names is None else names

    def place(self, number: int) -> slice:
        """Where in the source's list of texts or images block ``number`` lies."""
        return slice(number * self.size, min((number + 1) * self.size, len(self.names)))

    def __len__(self) -> int:
        return math.ceil(len(self.names) / self.size)

    def __getitem__(self, number: int) -> PairBatch:
        block = self.names[self.place(number)]
        return self.source.read(block, []) if self.kind == "texts" else self.source.read([], block)

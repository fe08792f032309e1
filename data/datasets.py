"""Datasets: halves of training micro-steps, and blocks of texts or images for evaluation.

A dataset maps an index to a batch and has no state: what is drawn is a function of (seed, rank, index).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import AnchorBatch, PairBatch
from data.checks import Expected, is_text_list, read_map
from data.split import RetrievalSplit, read_pairs
from utils.errors import InputError, counted
from utils.files import short_repr

MAX_TXT_LEN = 60  # the published recipes train on texts of at most this many word pieces
Anchor = Literal["image", "text"]


class HardNegativeDataset(Dataset[AnchorBatch]):
    """The halves of the micro-steps of a training in order: image-anchored, text-anchored, image-anchored, …

    Items 2p and 2p + 1 are the two halves of the ``micro_steps_per_pass`` micro-steps of pass p. Each kind of half walks
    through its own shuffle of this rank's texts, epoch after epoch. Negatives are drawn uniformly without replacement from the
    positive's own split: other images, or texts of this rank that belong to other images.

    The neighbours of an image, or a text of each, come first among its negatives, as many as there is room for. In the shuffle,
    a text is followed by one text of each neighbour, so that unimodal cues cancel in an update's gradient and only the pairing
    is learnt (as in NegCLIP, Yuksekgonul et al. 2023).

    Args:
        micro_steps: of the whole training, on this rank.
        rank, world_size: this rank uses every ``world_size``-th text.
        neighbours: by image, the names of images that are always among its negatives; names that a split lacks are ignored.

    Attributes:
        texts: for each split, indices in ``text_db.ids`` of this rank's texts.
        without_images: whether to leave out the features, which an ``ImageCache`` then fills in.

    Raises ``InputError`` for too few images or texts for ``negative_size``, and for ``neighbours`` of unknown images only.
    """

    def __init__(
        self,
        splits: Sequence[RetrievalSplit],
        *,
        negative_size: int,
        micro_steps: int,
        micro_steps_per_pass: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        neighbours: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self.splits = list(splits)
        self.without_images = False
        self.negative_size = negative_size
        self.micro_steps_per_pass = micro_steps_per_pass
        self.passes = micro_steps // micro_steps_per_pass
        self.seed, self.rank = seed, rank
        self._shards = [_Shard(split, split.texts[rank::world_size], neighbours) for split in self.splits]
        self.texts = [shard.texts for shard in self._shards]
        for shard in self._shards:
            self._check(shard, world_size)
        self._has_neighbours = any(shard.neighbours for shard in self._shards)
        if neighbours and not self._has_neighbours:
            given, known = short_repr(next(iter(neighbours))), short_repr(self.splits[0].image_names[0])
            raise InputError(f"neighbours: names no image of the training databases; has {given}, expected names like {known}")
        counts = [len(split.image_names) for split in self.splits]
        self._first_image = dict(zip(self.splits, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self._ends = np.cumsum([len(texts) for texts in self.texts])
        self._shuffled: dict[Anchor, tuple[int, np.ndarray]] = {}  # the epoch last asked for, and its order

    def __len__(self) -> int:
        return 2 * self.passes

    def anchor_batches_after(self, micro_steps: int) -> range:
        """Return the indices of the items that are left after this many micro-steps."""
        return range(2 * (micro_steps // self.micro_steps_per_pass), len(self))

    def __getitem__(self, index: int) -> AnchorBatch:
        step = index // 2 * self.micro_steps_per_pass
        anchor: Anchor = "text" if index % 2 else "image"
        steps = range(step, step + self.micro_steps_per_pass)
        pairs = [pair for step in steps for pair in self.candidates(anchor, step)]
        batch = read_pairs(pairs, without_images=self.without_images)
        if not self.without_images:
            return AnchorBatch(anchor, batch, self.micro_steps_per_pass)
        distinct = dict.fromkeys((split, name) for split, _, name in pairs)  # in the order of the batch
        images = torch.tensor([self._first_image[split] + split.text_db.image_index[name] for split, name in distinct])
        return AnchorBatch(anchor, batch, self.micro_steps_per_pass, images)

    def candidates(self, anchor: Anchor, step: int) -> list[tuple[RetrievalSplit, str, str]]:
        """Return the (split, text id, image name) triples of one half of micro-step ``step``, the positive first."""
        epoch, position = divmod(step, int(self._ends[-1]))
        if self._shuffled.get(anchor, (None,))[0] != epoch:
            self._shuffled[anchor] = epoch, self._shuffle(anchor, epoch)
        shard, text = self._locate(int(self._shuffled[anchor][1][position]))
        image = int(shard.image_of[text])
        ids, names = shard.split.text_db.ids, shard.split.image_names
        rng = self._rng(anchor, 1, step)
        if anchor == "image":
            drawn = self._draw(rng, len(shard.texts), shard.texts_of(image), shard.similar_texts(text))
            pairs = [(ids[index], names[image]) for index in shard.texts[[text, *drawn]]]
        else:
            drawn = self._draw(rng, len(names), np.array([image]), shard.similar_images(image))
            pairs = [(ids[shard.texts[text]], names[index]) for index in (image, *drawn)]
        return [(shard.split, *pair) for pair in pairs]

    def _locate(self, example: int) -> tuple[_Shard, int]:
        """Return the shard of one of this rank's texts, and the text's position there."""
        index = int(np.searchsorted(self._ends, example, side="right"))
        return self._shards[index], example - int(self._ends[index]) + len(self.texts[index])

    def _shuffle(self, anchor: Anchor, epoch: int) -> np.ndarray:
        """Return all texts in random order, with those of neighbours moved up behind the first of them."""
        order = self._rng(anchor, 0, epoch).permutation(int(self._ends[-1]))
        if not self._has_neighbours:
            return order
        moved: dict[int, None] = {}  # an ordered set
        for example in order.tolist():
            if example not in moved:
                shard, text = self._locate(example)
                moved.update(dict.fromkeys([example, *(shard.similar_texts(text) + (example - text)).tolist()]))
        return np.array(list(moved))

    def _draw(self, rng: np.random.Generator, total: int, own: np.ndarray, similar: np.ndarray) -> np.ndarray:
        """Draw ``negative_size`` different numbers below ``total``, none of them among ``own``, with ``similar`` first."""
        if len(similar) > self.negative_size:
            similar = rng.choice(similar, size=self.negative_size, replace=False)
        others = draw_others(rng, total, np.sort(np.concatenate([own, similar])), self.negative_size - len(similar))
        return np.concatenate([similar, others])

    def _rng(self, anchor: Anchor, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, anchor == "text", purpose, index])

    def _check(self, shard: _Shard, world_size: int) -> None:
        path, images, texts = shard.split.text_db.path, len(shard.split.image_names), len(shard.texts)
        if images <= self.negative_size:
            expected = f"expected more than negative_size {self.negative_size}; lower negative_size"
            raise InputError(f"{path}: {counted(images, 'image')}, {expected}")
        most = int(np.bincount(shard.image_of, minlength=1).max())
        if texts - most < self.negative_size:
            raise InputError(
                f"{path}: {counted(texts, 'text')} per rank (of {world_size}) within max_txt_len, {most} of one image, "
                f"expected negative_size {self.negative_size} of other images; lower negative_size, use fewer ranks or raise "
                "max_txt_len"
            )


class _Shard:
    """The texts of one split that this rank uses, grouped by image; a text is its position in ``texts``, an image its index.

    Attributes:
        texts: (n,), indices in ``text_db.ids``.
        image_of: (n,), the image of each.
        neighbours: by image, the images that are always among its negatives, if there are any.
    """

    def __init__(self, split: RetrievalSplit, texts: np.ndarray, neighbours: Mapping[str, Sequence[str]]) -> None:
        self.split, self.texts = split, texts
        self.image_of = split.image_of[texts]
        self._by_image = self.image_of.argsort(kind="stable").astype(np.int32)
        self._starts = np.searchsorted(self.image_of[self._by_image], np.arange(len(split.image_names) + 1))
        index = split.text_db.image_index
        self.neighbours: dict[int, np.ndarray] = {}
        for name, others in neighbours.items():
            known = [index[other] for other in others if other in index]
            if name in index and known:
                self.neighbours[index[name]] = np.array(known)

    def texts_of(self, image: int) -> np.ndarray:
        return self._by_image[self._starts[image] : self._starts[image + 1]]

    def similar_images(self, image: int) -> np.ndarray:
        return self.neighbours.get(image, np.empty(0, np.int64))

    def similar_texts(self, text: int) -> np.ndarray:
        """Return one text of each neighbour that has any: the n-th of the one image goes with the n-th of the other."""
        image = int(self.image_of[text])
        position = int((self.texts_of(image) == text).argmax())
        texts = [self.texts_of(other) for other in self.similar_images(image)]
        return np.array([of_image[position % len(of_image)] for of_image in texts if len(of_image)], np.int64)


def draw_others(rng: np.random.Generator, total: int, excluded: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` different numbers below ``total``, uniformly among those that are not in ``excluded``, which is sorted."""
    drawn = rng.choice(total - len(excluded), size=count, replace=False)
    for number in excluded:
        drawn += drawn >= number
    return drawn


def read_neighbours(path: Path | str) -> dict[str, list[str]]:
    """Read a JSON object of lists of other images' names by image name. Raises ``InputError`` for anything else."""
    neighbours = read_map(path, Expected("a list of image names", is_text_list))
    for image, names in neighbours.items():
        if len({image, *names}) <= len(names):
            raise InputError(f"{path}: {short_repr(image)} has {short_repr(names)}, expected each image once, and not itself")
    return neighbours


class BlockDataset(Dataset[PairBatch]):
    """All texts of a split, or all its images, ``size`` at a time; or ``names``, some of them."""

    def __init__(
        self, split: RetrievalSplit, kind: Literal["texts", "images"], size: int, names: Sequence[str] | None = None
    ) -> None:
        self.split, self.kind, self.size = split, kind, size
        everything = split.text_db.ids if kind == "texts" else split.image_names
        self.names = everything if names is None else names

    def positions(self, index: int) -> slice:
        """Return the positions that block ``index`` has among the texts or images."""
        return slice(index * self.size, min((index + 1) * self.size, len(self.names)))

    def __len__(self) -> int:
        return math.ceil(len(self.names) / self.size)

    def __getitem__(self, index: int) -> PairBatch:
        block = self.names[self.positions(index)]
        return self.split.read(block, []) if self.kind == "texts" else self.split.read([], block)

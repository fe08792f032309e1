"""What is scored together: training halves, and blocks of texts or images for evaluation. Everything becomes a PairBatch.

A task maps a number to a batch and has no state: what a half holds is a function of (seed, worker, number).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import Half, PairBatch, check_length, collate
from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from model.config import UniterConfig
from utils.errors import InputError

LOGGER = logging.getLogger(__name__)
Anchor = Literal["image", "text"]


class PairSource:
    """A text database and the image database its texts belong to, checked against each other and against the model.

    Use it as a context manager, or ``close`` it.

    Args:
        max_txt_len: leave out texts of more word pieces; -1 for none.

    Attributes:
        text_ids: the texts within ``max_txt_len``, in the database's order.
        image_names: the images that the text database names, in its order. An image database may hold other splits' images too.

    Raises:
        InputError: a database is missing or damaged, a text or an image that the sidecars name is absent, or the model's
            vocabulary or position table is too small.
    """

    def __init__(
        self, txt_db: str, img_db: str, config: UniterConfig, image_settings: dict[str, Any], max_txt_len: int = -1
    ) -> None:
        self.config = config
        self.text_db = TextDatabase(txt_db)
        self.image_db = ImageDatabase(img_db, **image_settings)
        self.image_names = list(dict.fromkeys(self.text_db.image_of[text_id] for text_id in self.text_db.ids))
        lengths = self.text_db.lengths
        self.text_ids = [i for i in self.text_db.ids if max_txt_len == -1 or lengths[i] <= max_txt_len]
        if self.text_db.vocab_size != config.vocab_size:
            message = f"{txt_db}: made with a vocabulary of {self.text_db.vocab_size}, the model has {config.vocab_size}"
            if self.text_db.vocab_size > config.vocab_size:
                raise InputError(message)
            LOGGER.warning("%s: is it the same one, padded?", message)
        longest = max(self.text_ids, key=lengths.__getitem__, default=None)
        if longest is not None:
            check_length(longest, lengths[longest], config)
        with self:  # open environments must not cross the fork of the loader's workers
            absent = [text_id for text_id in self.text_ids if text_id not in self.text_db]
            if absent:
                raise InputError(f"{txt_db}: text {absent[0]!r}, which id2len.json names, is absent ({len(absent)} in all)")
            absent = [name for name in self.image_names if name not in self.image_db]
            if absent:
                raise InputError(f"{img_db}: image {absent[0]!r}, which {txt_db} names, is absent ({len(absent)} in all)")

    def fingerprint(self) -> dict[str, str]:
        """Checksums by which to tell later whether these are still the same data, wherever they have been copied to."""
        return {"txt_db": self.text_db.fingerprint(), "img_db": self.image_db.fingerprint()}

    def close(self) -> None:
        """Let go of both databases; a later look-up opens them again."""
        self.text_db.close()
        self.image_db.close()

    def __enter__(self) -> PairSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, text_ids: Sequence[str], image_names: Sequence[str]) -> PairBatch:
        """The batch of these texts and images, with no pairs yet."""
        return collate(
            [self.text_db[text_id] for text_id in text_ids],
            [self.image_db[name] for name in image_names],
            torch.empty(0, 2, dtype=torch.int64),
            cls_id=self.text_db.cls_id,
            sep_id=self.text_db.sep_id,
            config=self.config,
        )


def read_pairs(pairs: Sequence[tuple[PairSource, str, str]]) -> PairBatch:
    """The batch of these (source, text id, image name), each distinct text and image read once."""
    texts: dict[tuple[PairSource, str], int] = {}
    images: dict[tuple[PairSource, str], int] = {}
    indices = [
        (texts.setdefault((source, text_id), len(texts)), images.setdefault((source, name), len(images)))
        for source, text_id, name in pairs
    ]
    first = pairs[0][0]
    return collate(
        [source.text_db[text_id] for source, text_id in texts],
        [source.image_db[name] for source, name in images],
        torch.tensor(indices),
        cls_id=first.text_db.cls_id,
        sep_id=first.text_db.sep_id,
        config=first.config,
    )


class HardNegativeTask(Dataset[Half]):
    """The halves of training in their order: image-anchored, text-anchored, image-anchored, …

    Half 2p and 2p + 1 are those of the ``micro_steps_per_pass`` micro-steps of pass p. Each kind of half walks through its
    own shuffle of this worker's texts, epoch after epoch. Negatives are drawn uniformly, without repetition, from the
    positive's own databases: other images, or texts of this worker that belong to other images.

    Args:
        micro_steps: of the whole training, on this worker.
        worker: takes every ``workers``-th text.

    Raises:
        InputError: too few images or texts for ``negative_size``, or databases that disagree about [CLS] and [SEP].
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        *,
        negative_size: int,
        micro_steps: int,
        micro_steps_per_pass: int = 1,
        seed: int = 0,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        self.sources = list(sources)
        self.negative_size = negative_size
        self.micro_steps_per_pass = micro_steps_per_pass
        self.passes = micro_steps // micro_steps_per_pass
        self.seed, self.worker = seed, worker
        self.texts: list[list[str]] = []  # of this worker, by source
        self.places: list[dict[str, list[int]]] = []  # by source, image → places of its texts in self.texts
        self.image_places: list[dict[str, int]] = []
        for source in self.sources:
            kept = source.text_ids[worker::workers]
            places: dict[str, list[int]] = {}
            for place, text_id in enumerate(kept):
                places.setdefault(source.text_db.image_of[text_id], []).append(place)
            self._check(source, len(kept), max(map(len, places.values()), default=0), workers)
            self.texts.append(kept)
            self.places.append(places)
            self.image_places.append({name: place for place, name in enumerate(source.image_names)})
        self.bounds = np.cumsum([len(kept) for kept in self.texts])
        self._shuffled: dict[Anchor, tuple[int, np.ndarray]] = {}  # the shuffle last used, with its epoch

    def __len__(self) -> int:
        return 2 * self.passes

    def halves_after(self, micro_steps: int) -> range:
        """The numbers of the halves that are left after so many micro-steps."""
        return range(2 * (micro_steps // self.micro_steps_per_pass), len(self))

    def __getitem__(self, number: int) -> Half:
        index, kind = divmod(number, 2)
        anchor: Anchor = "image" if kind == 0 else "text"
        steps = range(index * self.micro_steps_per_pass, (index + 1) * self.micro_steps_per_pass)
        pairs = [pair for step in steps for pair in self.candidates(anchor, step)]
        return Half(anchor, read_pairs(pairs), self.micro_steps_per_pass)

    def candidates(self, anchor: Anchor, step: int) -> list[tuple[PairSource, str, str]]:
        """The (source, text id, image name) of one half of micro-step ``step``, the positive first."""
        epoch, position = divmod(step, int(self.bounds[-1]))
        if self._shuffled.get(anchor, (None,))[0] != epoch:
            self._shuffled[anchor] = epoch, self._rng(anchor, 0, epoch).permutation(int(self.bounds[-1]))
        example = int(self._shuffled[anchor][1][position])
        number = int(np.searchsorted(self.bounds, example, side="right"))
        source, texts = self.sources[number], self.texts[number]
        text_id = texts[example - int(self.bounds[number]) + len(texts)]
        name = source.text_db.image_of[text_id]
        rng = self._rng(anchor, 1, step)
        if anchor == "image":
            drawn = draw_others(rng, len(texts), self.places[number][name], self.negative_size)
            return [(source, text_id, name), *((source, texts[place], name) for place in drawn)]
        drawn = draw_others(rng, len(source.image_names), [self.image_places[number][name]], self.negative_size)
        return [(source, text_id, name), *((source, text_id, source.image_names[place]) for place in drawn)]

    def _rng(self, anchor: Anchor, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.worker, anchor == "text", purpose, number])

    def _check(self, source: PairSource, texts: int, most: int, workers: int) -> None:
        path, specials = source.text_db.path, (source.text_db.cls_id, source.text_db.sep_id)
        first = self.sources[0].text_db
        if specials != (first.cls_id, first.sep_id):
            raise InputError(f"{path}: [CLS] and [SEP] are {specials}, {first.path} has {(first.cls_id, first.sep_id)}")
        if len(source.image_names) <= self.negative_size:
            raise InputError(f"{path}: {len(source.image_names)} images, expected more than negative_size {self.negative_size}")
        if texts - most < self.negative_size:
            raise InputError(
                f"{path}: {texts} texts for each of {workers} workers within max_txt_len, {most} of them of one image, "
                f"expected negative_size {self.negative_size} of other images"
            )


def draw_others(rng: np.random.Generator, total: int, excluded: Sequence[int], count: int) -> np.ndarray:
    """``count`` different numbers below ``total``, uniformly among those that are not in ``excluded``, which is sorted."""
    drawn = rng.choice(total - len(excluded), size=count, replace=False)
    for number in excluded:
        drawn += drawn >= number
    return drawn


class BlockTask(Dataset[PairBatch]):
    """All texts of a source, or all its images, ``size`` at a time."""

    def __init__(self, source: PairSource, kind: Literal["texts", "images"], size: int) -> None:
        self.source = source
        self.kind = kind
        self.size = size
        self.names = source.text_db.ids if kind == "texts" else source.image_names

    def place(self, number: int) -> slice:
        """Where in the source's list of texts or images block ``number`` lies."""
        return slice(number * self.size, min((number + 1) * self.size, len(self.names)))

    def __len__(self) -> int:
        return math.ceil(len(self.names) / self.size)

    def __getitem__(self, number: int) -> PairBatch:
        block = self.names[self.place(number)]
        return self.source.read(block, []) if self.kind == "texts" else self.source.read([], block)

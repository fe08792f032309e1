"""The data of one split: a text database with the image database of its texts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batch import InputLimits, PairBatch, check_length, collate
from data.boxes import PUBLISHED_RULE, BoxRule
from data.image_db import Image, ImageDatabase
from data.text_db import Text, TextDatabase
from utils.errors import InputError

LOGGER = logging.getLogger(__name__)


class RetrievalSplit:
    """A text database and the image database of its texts, checked against each other and against the model's ``limits``.

    Attributes:
        texts: ascending indices in ``text_db.ids`` of the texts of at most ``max_txt_len`` word pieces, of all if it is -1.
        image_names: the images that the text database names, in its order; the image database may have others too.
        image_of: for each of ``text_db.ids``, the index in ``image_names`` of its image.

    Raises ``InputError`` if a database is missing or damaged, if a text or an image has no record, and if the model's
    vocabulary or position table is too small.
    """

    def __init__(
        self,
        txt_db: str,
        img_db: str,
        limits: InputLimits,
        rule: BoxRule = PUBLISHED_RULE,
        *,
        compressed: bool = False,
        max_txt_len: int = -1,
    ) -> None:
        self.limits = limits
        self.text_db = TextDatabase(txt_db)
        self.image_db = ImageDatabase(img_db, rule, compressed=compressed)
        self.image_names, self.image_of = self.text_db.images, self.text_db.image_of
        lengths = self.text_db.lengths
        self.texts = np.flatnonzero(lengths <= (lengths.max() if max_txt_len == -1 else max_txt_len))
        if self.text_db.vocab_size != limits.vocab_size:
            message = f"{txt_db}: made with a vocabulary of {self.text_db.vocab_size}, the model has {limits.vocab_size}"
            if self.text_db.vocab_size > limits.vocab_size:
                raise InputError(message)
            LOGGER.warning("%s; fine only if the model's vocabulary is the same one, padded", message)
        if len(self.texts):
            longest = int(self.texts[lengths[self.texts].argmax()])
            check_length(self.text_db.ids[longest], int(lengths[longest]), limits)
        with self:  # no environment may stay open when loader processes are forked
            if absent := self.text_db.absent():
                raise InputError(f"{txt_db}: has no record of text {absent[0]!r} in id2len.json ({len(absent)} in all)")
            if absent := self.image_db.absent(self.image_names):
                raise InputError(f"{img_db}: has no record of image {absent[0]!r} of {txt_db} ({len(absent)} in all)")

    def fingerprint(self) -> dict[str, str]:
        """Return checksums that tell whether these are still the same data, wherever they have been copied to."""
        return {"txt_db": self.text_db.fingerprint(), "img_db": self.image_db.fingerprint()}

    def close(self) -> None:
        """Release both databases; a later look-up opens them again."""
        self.text_db.close()
        self.image_db.close()

    def __enter__(self) -> RetrievalSplit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, text_ids: Iterable[str], image_names: Iterable[str]) -> PairBatch:
        """Read these texts and images into a batch without pairs."""
        texts, images = [self.text_db[text_id] for text_id in text_ids], [self.image_db[name] for name in image_names]
        return self._collate(texts, images, torch.empty(0, 2, dtype=torch.int64))

    def _collate(self, texts: Sequence[Text], images: Sequence[Image], pairs: Tensor) -> PairBatch:
        text_db = self.text_db
        return collate(texts, images, pairs, cls_id=text_db.cls_id, sep_id=text_db.sep_id, limits=self.limits)


def read_pairs(pairs: Sequence[tuple[RetrievalSplit, str, str]], *, without_images: bool = False) -> PairBatch:
    """Read a batch of (split, text id, image name) triples, each distinct text and image once.

    ``without_images`` leaves features and boxes empty, for a caller that has them already.
    """
    texts: dict[tuple[RetrievalSplit, str], int] = {}
    images: dict[tuple[RetrievalSplit, str], int] = {}
    indices = [
        (texts.setdefault((split, text_id), len(texts)), images.setdefault((split, name), len(images)))
        for split, text_id, name in pairs
    ]
    batch = pairs[0][0]._collate(
        [split.text_db[text_id] for split, text_id in texts],
        [] if without_images else [split.image_db[name] for split, name in images],
        torch.tensor(indices),
    )
    return replace(batch, image_names=tuple(name for _, name in images))

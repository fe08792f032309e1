"""A text database with the image database of its texts, checked against each other and against the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data.batch import InputLimits, PairBatch, check_length, collate
from data.boxes import BoxRule
from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from utils.errors import InputError

LOGGER = logging.getLogger(__name__)


class RetrievalSplit:
    """A text database and the image database its texts belong to, checked against each other and against the model.

    Use it as a context manager, or ``close`` it.

    Args:
        max_txt_len: leave out texts of more word pieces; -1 for none.

    Attributes:
        texts: places in ``text_db.ids`` of the texts within ``max_txt_len``, in their order.
        image_names: the images that the text database names, in its order. An image database may hold other splits' images too.
        image_of: the place in ``image_names`` of the image of each text in ``text_db.ids``.

    Raises:
        InputError: a database is missing or damaged, a text or an image that the sidecars name is absent, or the model's
            vocabulary or position table is too small.
    """

    def __init__(
        self,
        txt_db: str,
        img_db: str,
        limits: InputLimits,
        rule: BoxRule = BoxRule(),  # noqa: B008 - immutable
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
            LOGGER.warning("%s: is it the same one, padded?", message)
        if len(self.texts):
            longest = int(self.texts[lengths[self.texts].argmax()])
            check_length(self.text_db.ids[longest], int(lengths[longest]), limits)
        with self:  # open environments must not cross the fork of the loader's workers
            absent = self.text_db.absent()
            if absent:
                raise InputError(f"{txt_db}: text {absent[0]!r}, which id2len.json names, is absent ({len(absent)} in all)")
            absent = self.image_db.absent(self.image_names)
            if absent:
                raise InputError(f"{img_db}: image {absent[0]!r}, which {txt_db} names, is absent ({len(absent)} in all)")

    def fingerprint(self) -> dict[str, str]:
        """Checksums by which to tell later whether these are still the same data, wherever they have been copied to."""
        return {"txt_db": self.text_db.fingerprint(), "img_db": self.image_db.fingerprint()}

    def close(self) -> None:
        """Let go of both databases; a later look-up opens them again."""
        self.text_db.close()
        self.image_db.close()

    def __enter__(self) -> RetrievalSplit:
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
            limits=self.limits,
        )


def read_pairs(pairs: Sequence[tuple[RetrievalSplit, str, str]], *, without_images: bool = False) -> PairBatch:
    """The batch of these (source, text id, image name), each distinct text and image read once.

    ``without_images`` leaves features and boxes empty, for one who has them already.
    """
    texts: dict[tuple[RetrievalSplit, str], int] = {}
    images: dict[tuple[RetrievalSplit, str], int] = {}
    indices = [
        (texts.setdefault((source, text_id), len(texts)), images.setdefault((source, name), len(images)))
        for source, text_id, name in pairs
    ]
    first = pairs[0][0]
    batch = collate(
        [source.text_db[text_id] for source, text_id in texts],
        [] if without_images else [source.image_db[name] for source, name in images],
        torch.tensor(indices),
        cls_id=first.text_db.cls_id,
        sep_id=first.text_db.sep_id,
        limits=first.limits,
    )
    return replace(batch, image_names=tuple(name for _, name in images))

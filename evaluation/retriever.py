"""A trained model from Python: scores of captions and images, a ranked database, the attention of a pair (docs/api.md).

Shapes: T texts, I images, P pairs; A heads, L word pieces, K regions, N = L + 2 + K.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from data.batch import PairBatch, collate
from data.image_db import Image, ImageDatabase
from data.text_db import Text
from data.tokenizer import WordPieceTokenizer, load_tokenizer
from evaluation.options import RetrieverOptions
from evaluation.scoring import finite_scores
from model.checkpoint import load_ranking_model
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.iais import PairAttention
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import MapRequest
from utils.errors import InputError
from utils.files import sha256
from utils.precision import Precision, choose_device, choose_precision
from utils.provenance import provenance

PAIRS_PER_BATCH = 1024  # whose images may be as many, and are on the device together
IMAGES_PER_BLOCK = 256  # of a database, read and ranked together
LOGGER = logging.getLogger(__name__)


class Ranked(NamedTuple):
    """An image of a database and its raw score."""

    name: str
    score: float

    @property
    def sigmoid(self) -> float:
        """s(text, image) of the paper, from 0 to 1."""
        return 0.5 + 0.5 * math.tanh(self.score / 2)


class AttentionBlocks(NamedTuple):
    """Logarithms of the attention of words (L) and regions (V); rows attend to columns, and each row of ``exp`` sums to one."""

    LL: Tensor  # (L, L)
    VV: Tensor  # (K, K)
    LV: Tensor  # (L, K)
    VL: Tensor  # (K, L)


class Attention(NamedTuple):
    """Attention of one (text, image) pair.

    Attributes:
        score: raw output of the ranking head.
        pieces: L word pieces, without [CLS] and [SEP].
        image: its K regions.
        maps: by layer, counted from 0: (A, N, N) = Q Kᵀ / √D before the softmax, fp32 on the CPU, words before regions.
    """

    score: float
    pieces: list[str]
    image: Image
    maps: dict[int, Tensor]

    def blocks(self, layer: int = -1, head: int | None = None) -> AttentionBlocks:
        """The four blocks of ``pair``, averaged over its heads. Raises ``InputError`` as ``pair`` does."""
        blocks = self.pair(layer, head).head_mean()
        return AttentionBlocks(LL=blocks.intra, VV=blocks.other, LV=blocks.cross, VL=blocks.cross_back)

    def pair(self, layer: int = -1, head: int | None = None) -> PairAttention:
        """The attention of one layer, or of one ``head`` of it; -1 is the last of the layers held.

        Raises:
            InputError: the layer is not held, or has no such head.
        """
        layer = max(self.maps) if layer == -1 else layer
        if layer not in self.maps:
            raise InputError(f"layer {layer}: its attention is not held, expected one of {sorted(self.maps)}")
        scores = self.maps[layer]
        if head is not None and not 0 <= head < len(scores):
            raise InputError(f"head {head}: expected 0 to {len(scores) - 1}")
        return PairAttention.of_map(scores if head is None else scores[head, None], len(self.pieces) + 2, layer)


class Retriever:
    """A model with its tokenizer, on a device; nothing in it changes once it is made.

    A text is a caption or a record of a text database, made with the same vocabulary. s(text, image) of the paper is the
    sigmoid of the scores here.

    Attributes:
        model, tokenizer: what scores, in evaluation mode, and what makes word pieces of captions.
        compute: the device and the arithmetic.
    """

    def __init__(self, model: RetrievalModel, tokenizer: WordPieceTokenizer, compute: ComputeSettings) -> None:
        size, expected = len(tokenizer.pieces), model.config.vocab_size
        if size > expected:
            raise InputError(f"vocabulary {tokenizer.name}: has {size} word pieces, the model has vocab_size {expected}")
        if size < expected:
            LOGGER.warning(
                "vocabulary %s: has %d word pieces, the model %d: is it the same one, padded?", tokenizer.name, size, expected
            )
        self.model = model.to(compute.precision.device).eval()
        self.tokenizer = tokenizer
        self.compute = compute

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        model_config: str | Path,
        *,
        vocab: str | Path | None = None,
        device: str = "auto",
        precision: str | None = None,
        batch_size: int = 400,
    ) -> Retriever:
        """Read a model as ``inf_itm.py`` does; the arguments are its options, and ``vocab`` a ``vocab.txt``.

        Without ``vocab`` the vocabulary is that of bert-base-cased.

        Raises:
            InputError: a file is missing, damaged, or does not fit the others; the checkpoint has no ranking head; or the
                device or the precision is not to be had.
        """
        where = choose_device(device)
        how = Precision(choose_precision(precision, False, where), where)
        tokenizer = load_tokenizer(vocab)
        model, _ = load_ranking_model(checkpoint, UniterConfig.from_json(model_config))
        chunk = ChunkSize.for_device(where, model.config.intermediate_size, batch_size)
        return cls(model, tokenizer, ComputeSettings(how, chunk, prepare=packed_for_inference))

    @classmethod
    def from_options(cls, options: RetrieverOptions, batch_size: int = 400) -> Retriever:
        """``from_checkpoint`` as the options of a program say."""
        return cls.from_checkpoint(
            options.checkpoint,
            options.architecture,
            vocab=options.vocab,
            device=options.device,
            precision=options.precision,
            batch_size=batch_size,
        )

    def provenance(self, options: RetrieverOptions, image_db: ImageDatabase) -> dict[str, Any]:
        """What numbers depend on that this model gives for images of ``image_db``, to be kept with them."""
        return {
            "options": asdict(options),
            "device": str(self.compute.precision.device),
            "precision": self.compute.precision.name,
            "vocabulary": self.tokenizer.name,
            "checkpoint_sha256": sha256(options.checkpoint),
            "image_db": image_db.describe(),
            **provenance(),
        }

    @property
    def config(self) -> UniterConfig:
        """The architecture."""
        return self.model.config

    def score(self, texts: Sequence[str | Text], images: Sequence[Image]) -> np.ndarray:
        """Raw scores of every text with every image: (T, I) float32. Raises ``InputError`` as ``score_pairs`` does."""
        pairs = np.indices((len(texts), len(images))).reshape(2, -1).T
        return self.score_pairs(texts, images, pairs).reshape(len(texts), len(images))

    @torch.no_grad()
    def score_pairs(self, texts: Sequence[str | Text], images: Sequence[Image], pairs: ArrayLike) -> np.ndarray:
        """Raw scores of ``pairs`` (P, 2), places in ``texts`` and ``images``: (P,) float32.

        Raises:
            InputError: a text is empty or too long, has word pieces that are not in the vocabulary, an image has features of
                another width than the model takes, or a score is not finite.
        """
        batch = self._batch(texts, images, pairs)
        scores = np.empty(len(batch.pairs), np.float32)
        by_image = batch.pairs[:, 1].argsort(stable=True)  # so that few images are in a batch
        for first in range(0, len(scores), PAIRS_PER_BATCH):
            places = by_image[first : first + PAIRS_PER_BATCH]
            chosen = batch.select(batch.pairs[places])
            values = self.model(chosen.to(self.compute.precision.device), self.compute).scores
            scores[places.numpy()] = finite_scores(values, chosen)
        return scores

    def rank(self, text: str | Text, image_db: ImageDatabase, top: int | None = None) -> list[Ranked]:
        """The images of a database by falling score, all or the ``top`` ones; equal scores in the database's order.

        Reads the database block by block; memory holds one block, and all names and scores. Raises ``InputError`` as
        ``rank_each`` does.
        """
        return self.rank_each([text], image_db, top)[0]

    def rank_each(self, texts: Sequence[str | Text], image_db: ImageDatabase, top: int | None = None) -> list[list[Ranked]]:
        """``rank`` for several texts, for all of which the database is read once.

        Raises:
            InputError: as ``score_pairs``; a record is missing or damaged; the database names no image; ``top`` is less than 1.
        """
        if top is not None and top < 1:
            raise InputError(f"top is {top}, expected at least 1")
        names = image_db.names()
        if not names:
            raise InputError(f"{image_db.path}: empty image database, expected an image to rank")
        captions = [self._text(text) for text in texts]
        scores = np.empty((len(captions), len(names)), np.float32)
        with self.compute.inference(self.model):
            for first in range(0, len(names), IMAGES_PER_BLOCK):
                block = slice(first, first + IMAGES_PER_BLOCK)
                scores[:, block] = self.score(captions, [image_db[name] for name in names[block]])
        order = (-scores).argsort(axis=1, kind="stable")[:, :top]
        return [
            [Ranked(names[place], float(row[place])) for place in places] for row, places in zip(scores, order, strict=True)
        ]

    @torch.no_grad()
    def attention(self, text: str | Text, image: Image, layers: Sequence[int] | None = None) -> Attention:
        """Attention of one pair in these layers, counted from 0, or in all.

        Raises:
            InputError: as ``score_pairs``, or there is no such layer.
        """
        count = self.config.num_hidden_layers
        layers = range(count) if layers is None else layers
        for layer in layers:
            if not 0 <= layer < count:
                raise InputError(f"layer {layer}: expected 0 to {count - 1}")
        text = self._text(text)
        batch = self._batch([text], [image], [(0, 0)])
        scored = self.model(batch.to(self.compute.precision.device), self.compute, MapRequest([0], layers))
        score = float(finite_scores(scored.scores, batch)[0])
        maps = {layer: scored.maps[layer][0].cpu() for layer in layers}
        return Attention(score, self.tokenizer.tokens(text.input_ids.tolist()), image, maps)

    def _batch(self, texts: Sequence[str | Text], images: Sequence[Image], pairs: ArrayLike) -> PairBatch:
        cls_id, sep_id = (self.tokenizer.ids[name] for name in ("[CLS]", "[SEP]"))
        captions = [self._text(text) for text in texts]
        asked = torch.from_numpy(np.asarray(pairs, np.int64).reshape(-1, 2))
        return collate(captions, images, asked, cls_id=cls_id, sep_id=sep_id, limits=self.config.input_limits)

    def _text(self, text: str | Text) -> Text:
        """A caption as a record, called by its own beginning."""
        if isinstance(text, str):
            name = text if len(text) <= 60 else f"{text[:59]}…"
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"text {name!r} is not Unicode ({error.reason}), expected a caption") from error
            text = Text(name, np.array(self.tokenizer.encode(text), np.int64), "", {})
        if not len(text.input_ids):
            raise InputError(f"text {text.id!r} has no word pieces, expected a caption")
        if text.input_ids.max() >= len(self.tokenizer.pieces):
            raise InputError(
                f"text {text.id!r} has word-piece id {text.input_ids.max()}, "
                f"the vocabulary {self.tokenizer.name} has {len(self.tokenizer.pieces)}"
            )
        return text

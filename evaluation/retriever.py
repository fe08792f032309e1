"""A trained model from Python: score captions and images, rank a database, look into attention (docs/api.md).

Shapes: T texts, I images, P pairs; A heads, L word pieces, K regions, N = L + 2 + K.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from data.batch import PairBatch, collate
from data.checks import check_vocabularies
from data.image_db import Image, ImageDatabase
from data.text_db import Text, TextDatabase
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
from utils.files import short_repr
from utils.precision import DTYPES, Precision, choose_device, choose_precision

PAIRS_PER_BATCH = 1024  # with up to as many images, which are on the device together
IMAGES_PER_BLOCK = 256  # of a database, read and scored together
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
    """Log-attention of words (L) and regions (V); rows attend to columns, each row of ``exp`` sums to one."""

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
        """Return the four blocks of one layer, the mean of its heads or one ``head``. Raises ``InputError`` as ``pair``."""
        blocks = self.pair(layer, head).head_mean()
        return AttentionBlocks(LL=blocks.intra, VV=blocks.other, LV=blocks.cross, VL=blocks.cross_back)

    def pair(self, layer: int = -1, head: int | None = None) -> PairAttention:
        """Return one layer, all heads or one ``head``, as regularisers take it; layer -1 is the last one in ``maps``.

        Raises ``InputError`` for a layer that is not in ``maps``, or a head that does not exist.
        """
        known = sorted(self.maps)
        _require(_are([layer], Integral) and layer in (-1, *known), "layer", layer, f"one of those requested, {known}, or -1")
        layer = known[-1] if layer == -1 else layer
        scores = self.maps[layer]
        is_head = head is None or (_are([head], Integral) and 0 <= head < len(scores))
        _require(is_head, "head", head, f"0 to {len(scores) - 1}, or None")
        return PairAttention.of_map(scores if head is None else scores[head, None], len(self.pieces) + 2, layer)


class Retriever:
    """A model with its tokenizer on a device; immutable.

    A text is a caption, or a record of a text database made with the same vocabulary. The paper's s(text, image) is the sigmoid
    of these scores.

    Attributes:
        model: in evaluation mode.
        compute: device, precision and batch size.
    """

    def __init__(self, model: RetrievalModel, tokenizer: WordPieceTokenizer, compute: ComputeSettings) -> None:
        _require(isinstance(model, RetrievalModel), "model", model, "a RetrievalModel")
        _require(isinstance(tokenizer, WordPieceTokenizer), "tokenizer", tokenizer, "a WordPieceTokenizer")
        _require(isinstance(compute, ComputeSettings), "compute", compute, "ComputeSettings")
        size, expected = len(tokenizer.pieces), model.config.vocab_size
        if size > expected:
            raise InputError(
                f"vocabulary {tokenizer.name}: has {size} word pieces, the model has vocab_size {expected}; give the vocab.txt "
                "that the model was trained with"
            )
        if size < expected:
            message = "vocabulary %s: has %d word pieces, the model %d; this is fine only if it is the same one, padded"
            LOGGER.warning(message, tokenizer.name, size, expected)
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
        train_config: str | Path | None = None,
        device: str = "auto",
        precision: str | None = None,
        batch_size: int = 400,
    ) -> Retriever:
        """Load a model as ``inf_itm.py`` does, with its options; ``vocab`` is a ``vocab.txt``, by default of bert-base-cased.

        ``train_config`` is the ``log/hps.json`` of the training, whose vocabulary must be the same. Raises ``InputError`` if a
        file is missing, damaged, or does not fit the others, the checkpoint has no ranking head, or the device or precision is
        not available.
        """
        for name, path in (("checkpoint", checkpoint), ("model_config", model_config)):
            _require(isinstance(path, str | Path), name, path, "the path of a file")
        for name, optional in (("vocab", vocab), ("train_config", train_config)):
            _require(optional is None or isinstance(optional, str | Path), name, optional, "the path of a file")
        _require(isinstance(device, str), "device", device, "auto, cpu, cuda, cuda:N or mps")
        _require(precision in (None, "auto", *DTYPES), "precision", precision, f"auto, {', '.join(DTYPES)} or None")
        _require(_are([batch_size], Integral) and batch_size >= 1, "batch_size", batch_size, "an integer of at least 1")
        where = choose_device(device)
        how = Precision(choose_precision(precision, False, where), where)
        tokenizer = load_tokenizer(vocab)
        check_vocabularies({f"vocabulary {tokenizer.name}": tokenizer.meta()}, checkpoint, train_config)
        model, _ = load_ranking_model(checkpoint, UniterConfig.from_json(model_config))
        chunk = ChunkSize.for_device(where, model.config.intermediate_size, batch_size)
        return cls(model, tokenizer, ComputeSettings(how, chunk, prepare=packed_for_inference))

    @classmethod
    def from_options(cls, options: RetrieverOptions, batch_size: int = 400) -> Retriever:
        """Load the model that the options of a program name; see ``from_checkpoint``."""
        given = {name: getattr(options, name) for name in ("vocab", "train_config", "device", "precision")}
        return cls.from_checkpoint(options.checkpoint, options.architecture, batch_size=batch_size, **given)

    def check_vocabulary(self, text_db: TextDatabase) -> None:
        """Raise ``InputError`` if ``text_db`` was made with another vocabulary."""
        check_vocabularies({f"vocabulary {self.tokenizer.name}": self.tokenizer.meta(), text_db.path: text_db.meta})

    @property
    def config(self) -> UniterConfig:
        """The architecture."""
        return self.model.config

    def score(self, texts: Sequence[str | Text], images: Sequence[Image]) -> np.ndarray:
        """Return raw scores of every text with every image: (T, I) float32. Raises ``InputError`` as ``score_pairs`` does."""
        _require_inputs(texts, images)
        pairs = np.indices((len(texts), len(images))).reshape(2, -1).T
        return self.score_pairs(texts, images, pairs).reshape(len(texts), len(images))

    @torch.no_grad()
    def score_pairs(self, texts: Sequence[str | Text], images: Sequence[Image], pairs: ArrayLike) -> np.ndarray:
        """Return raw scores of ``pairs`` (P, 2), indices into ``texts`` and ``images``: (P,) float32.

        Raises ``InputError`` if a text is empty, too long or has ids outside the vocabulary, an image has features of another
        width than the model's, or a score is not finite.
        """
        _require_inputs(texts, images)
        try:
            indices = np.asarray(pairs) if len(pairs) else np.empty((0, 2), int)  # type: ignore[arg-type]
            is_table = indices.dtype.kind in "iu" and indices.shape[1:] == (2,)
        except (TypeError, ValueError):
            is_table = False
        inside = is_table and bool(((indices >= 0) & (indices < (len(texts), len(images)))).all())
        _require(inside, "pairs", pairs, f"(text, image) indices, less than {len(texts)} and {len(images)}")
        batch = self._batch(texts, images, indices)
        scores = np.empty(len(batch.pairs), np.float32)
        by_image = batch.pairs[:, 1].argsort(stable=True)  # few images per batch
        for first in range(0, len(scores), PAIRS_PER_BATCH):
            chosen = by_image[first : first + PAIRS_PER_BATCH]
            part = batch.select(batch.pairs[chosen])
            values = self.model(part.to(self.compute.precision.device), self.compute).scores
            scores[chosen.numpy()] = finite_scores(values, part)
        return scores

    def rank(self, text: str | Text, image_db: ImageDatabase, top: int | None = None) -> list[Ranked]:
        """Return the images of a database, all or the ``top`` ones, by descending score; ties keep the database's order.

        Reads the database in blocks; memory holds one block and all names and scores. Raises ``InputError`` as ``rank_each``.
        """
        return self.rank_each([self._text(text)], image_db, top)[0]

    def rank_each(self, texts: Sequence[str | Text], image_db: ImageDatabase, top: int | None = None) -> list[list[Ranked]]:
        """``rank`` for several texts, reading the database once.

        Raises ``InputError`` as ``score_pairs`` does, for a damaged record, an empty database, and if ``top`` is less than 1.
        """
        _require_inputs(texts, ())
        _require(isinstance(image_db, ImageDatabase), "image_db", image_db, "an ImageDatabase")
        is_count = top is None or (_are([top], Integral) and top >= 1)
        _require(is_count, "top", top, "an integer of at least 1, or None for all images")
        names = image_db.names()
        if not names:
            raise InputError(f"{image_db.path}: empty image database, expected at least one image to rank")
        captions = [self._text(text) for text in texts]
        scores = np.empty((len(captions), len(names)), np.float32)
        with self.compute.inference(self.model):
            for first in range(0, len(names), IMAGES_PER_BLOCK):
                block = slice(first, first + IMAGES_PER_BLOCK)
                scores[:, block] = self.score(captions, [image_db[name] for name in names[block]])
        order = (-scores).argsort(axis=1, kind="stable")[:, :top]
        return [[Ranked(names[i], float(row[i])) for i in indices] for row, indices in zip(scores, order, strict=True)]

    @torch.no_grad()
    def attention(self, text: str | Text, image: Image, layers: Sequence[int] | None = None) -> Attention:
        """Return the attention of one pair in these layers, counted from 0, or in all.

        Raises ``InputError`` as ``score_pairs`` does, and for a layer that does not exist.
        """
        count = self.config.num_hidden_layers
        layers = range(count) if layers is None else layers
        are_layers = _are(layers, Integral) and len(layers) > 0 and 0 <= min(layers) <= max(layers) < count
        _require(are_layers, "layers", layers, f"some of 0 to {count - 1}, or None for all")
        text = self._text(text)
        _require_inputs([text], [image])
        batch = self._batch([text], [image], np.zeros((1, 2)))
        scored = self.model(batch.to(self.compute.precision.device), self.compute, MapRequest([0], layers))
        score = float(finite_scores(scored.scores, batch)[0])
        maps = {layer: scored.maps[layer][0].cpu() for layer in layers}
        return Attention(score, self.tokenizer.tokens(text.input_ids.tolist()), image, maps)

    def _batch(self, texts: Sequence[str | Text], images: Sequence[Image], pairs: np.ndarray) -> PairBatch:
        cls_id, sep_id = (self.tokenizer.ids[name] for name in ("[CLS]", "[SEP]"))
        asked = torch.from_numpy(pairs.astype(np.int64))
        records = [self._text(text) for text in texts]
        return collate(records, images, asked, cls_id=cls_id, sep_id=sep_id, limits=self.config.input_limits)

    def _text(self, text: str | Text) -> Text:
        """Return a caption as a record, with its beginning as the id."""
        _require(isinstance(text, str | Text), "text", text, "a caption or a record of a text database")
        if isinstance(text, str):
            name = text if len(text) <= 60 else f"{text[:59]}…"
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"text {name!r} is not Unicode ({error.reason}), expected a caption in UTF-8") from error
            text = Text(name, np.array(self.tokenizer.encode(text), np.int64), "", {})
        ids, size = np.asarray(text.input_ids), len(self.tokenizer.pieces)
        if not ids.size:
            raise InputError(f"text {text.id!r} has no word pieces, expected a caption")
        _require(ids.ndim == 1 and ids.dtype.kind in "iu", f"input_ids of text {text.id!r}", ids, "a vector of integers")
        for extreme in (ids.max(), ids.min()):
            if not 0 <= extreme < size:
                known = f"the vocabulary {self.tokenizer.name} has {size}; expected a text database made with this vocabulary"
                raise InputError(f"text {text.id!r} has word-piece id {extreme}, {known}")
        return text


def _require(holds: bool, argument: str, value: object, expected: str) -> None:
    """Raise ``InputError`` for the value of an argument unless ``holds``."""
    if not holds:
        raise InputError(f"{argument} is {' '.join(short_repr(value).split())}, expected {expected}")


def _are(values: object, kind: type | UnionType) -> bool:
    """Return whether this is a sequence of values of a kind; a string is none of captions, and a bool no number."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _require_inputs(texts: Sequence[str | Text], images: Sequence[Image]) -> None:
    _require(_are(texts, str | Text), "texts", texts, "a list of captions or of records of a text database")
    _require(_are(images, Image), "images", images, "a list of images of an ImageDatabase")
    for image in images:
        shapes = np.shape(image.features), np.shape(image.boxes)
        fits = len(shapes[0]) == 2 and shapes[1] == (shapes[0][0], 7)
        _require(fits, f"shape of features and boxes of image {image.name!r}", shapes, "(K, D) and (K, 7)")

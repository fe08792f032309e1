"""Score texts against images: every image is decoded and embedded once, however many texts it meets.

Shapes: T texts, I images of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.batch import Ragged
from data.loader import Loader
from data.tasks import BlockTask, PairSource, draw_others
from model.retrieval import Compute, RetrievalModel
from model.uniter import Embedded
from utils.errors import InputError

TEXTS_PER_BLOCK = 16
IMAGES_PER_BLOCK = 256


class ScoreMatrix(NamedTuple):
    """``scores``: (T, I) float32, raw outputs of the ranking head, -inf where not asked for; rows and columns by name."""

    scores: np.ndarray
    text_ids: list[str]
    image_names: list[str]


@torch.no_grad()
def score_matrix(
    model: RetrievalModel,
    source: PairSource,
    compute: Compute,
    loader: Loader,
    *,
    wanted: np.ndarray | None = None,
    cache_bytes: int = 4 << 30,
) -> ScoreMatrix:
    """Score every text of ``source`` against every image, or only the ``wanted`` (T, I) pairs.

    Args:
        cache_bytes: embedded images held at a time, on the device; with more, the texts are walked through for each such part.

    Raises:
        InputError: a record that cannot be read, or a score that is not finite.
    """
    model.eval()
    text_ids, image_names = source.text_db.ids, source.image_names
    scores = np.full((len(text_ids), len(image_names)), -np.inf, np.float32)
    total = scores.size if wanted is None else int(wanted.sum())
    with tqdm(total=total, desc="scoring", unit="pair", unit_scale=True, dynamic_ncols=True) as progress:
        for images in _embedded_images(model, source, compute, loader, cache_bytes):
            first_row = 0
            for batch in loader(BlockTask(source, "texts", TEXTS_PER_BLOCK)):
                texts = model.embed(batch, compute).texts
                rows = slice(first_row, first_row + len(batch.text_ids))
                for first_column, block in images:
                    columns = slice(first_column, first_column + len(block.lengths))
                    asked = np.ones_like(scores[rows, columns], bool) if wanted is None else wanted[rows, columns]
                    pairs = torch.from_numpy(np.argwhere(asked))
                    if len(pairs):
                        values = model.score(Embedded(texts, block), pairs, compute).scores
                        scores[rows, columns][asked] = _finite(values, pairs, batch.text_ids, image_names[columns])
                        progress.update(len(pairs))
                first_row += len(batch.text_ids)
    return ScoreMatrix(scores, text_ids, image_names)


def sampled_candidates(source: PairSource, images_per_text: int) -> np.ndarray:
    """For quick validation: (T, I) booleans, for each text its own image and random others, ``images_per_text`` in all.

    They are the same at each call, so that runs and seeds are compared on the same candidates.
    """
    rng = np.random.default_rng(0)
    column_of = {name: column for column, name in enumerate(source.image_names)}
    wanted = np.zeros((len(source.text_db), len(source.image_names)), bool)
    others = min(images_per_text, len(source.image_names)) - 1
    for row, text_id in enumerate(source.text_db.ids):
        own = column_of[source.text_db.image_of[text_id]]
        wanted[row, draw_others(rng, len(source.image_names), [own], others)] = True
        wanted[row, own] = True
    return wanted


def _embedded_images(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader, cache_bytes: int
) -> Iterator[list[tuple[int, Ragged]]]:
    """Lists of (first column, embedded images) that fit ``cache_bytes``."""
    held: list[tuple[int, Ragged]] = []
    size = first = 0
    for batch in loader(BlockTask(source, "images", IMAGES_PER_BLOCK)):
        images = model.embed(batch, compute).images
        if held and size + images.rows.nbytes > cache_bytes:
            yield held
            held, size = [], 0
        held.append((first, images))
        size += images.rows.nbytes
        first += len(batch.image_names)
    yield held


def _finite(values: Tensor, pairs: Tensor, text_ids: tuple[str, ...], image_names: list[str]) -> np.ndarray:
    scores = values.float().cpu()
    if not bool(scores.isfinite().all()):
        text, image = pairs[int(scores.isfinite().logical_not().nonzero()[0])].tolist()
        raise InputError(
            f"the score of text {text_ids[text]!r} and image {image_names[image]!r} is not finite: damaged weights?"
        )
    return scores.numpy()

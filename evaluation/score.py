"""Score texts against images: every image is decoded and embedded once by a worker, however many texts it meets.

Shapes: T texts, I images of the split, C candidates of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import PairBatch, Ragged
from data.loader import Loader
from data.names import Names
from data.tasks import BlockTask, PairSource, draw_others
from evaluation.rounds import shared_out
from evaluation.unfinished import unscored
from model.retrieval import Compute, RetrievalModel
from model.uniter import Embedded
from utils.distributed import Workers
from utils.errors import InputError
from utils.logger import progress_bar

TEXTS_PER_BLOCK = 16
IMAGES_PER_BLOCK = 256


class ScoreMatrix(NamedTuple):
    """``scores``: (T, I) float32, or (T, C) for some candidates of each text, raw outputs of the ranking head."""

    scores: np.ndarray
    text_ids: Names
    image_names: Names


@torch.no_grad()
def score_matrix(
    model: RetrievalModel,
    source: PairSource,
    compute: Compute,
    loader: Loader,
    workers: Workers,
    *,
    candidates: np.ndarray | None = None,
    into: np.ndarray | None = None,
    cache_bytes: int = 4 << 30,
) -> ScoreMatrix | None:
    """Score every text of ``source`` against every image, or against its ``candidates``; on workers but 0 returns None.

    Blocks of texts are shared out among the workers. The scores are the same to the bit for any number of them. Time grows
    with the number of pairs; memory does not, but for the scores, which lie in a temporary file if they are large.

    Args:
        candidates: (T, C) places of images in ``source.image_names``, different ones in a row.
        into: float32 on worker 0, of the shape of the scores, NaN where one is missing; blocks of texts without any are left.
        cache_bytes: embedded images held at a time, on the device; with more, the texts are walked through for each such part.

    Raises:
        InputError: a record that cannot be read, a score that is not finite, or no room for the scores on disk.
        WorkerLost: another worker has gone.
    """
    model.eval()
    text_ids, image_names = source.text_db.ids, source.image_names
    task = BlockTask(source, "texts", TEXTS_PER_BLOCK)
    shape = len(text_ids), len(image_names) if candidates is None else candidates.shape[1]
    scores = np.empty((0, 0), np.float32)
    if workers.first:
        scores = unscored(shape) if into is None else into

    def asked_of(rows: slice) -> np.ndarray:
        """(rows, C or I) places of images."""
        if candidates is not None:
            return candidates[rows]
        return np.broadcast_to(np.arange(shape[1]), (rows.stop - rows.start, shape[1]))

    with (
        model.prepared(compute),
        progress_bar(workers.first, total=math.prod(shape), desc="scoring", unit="pair", unit_scale=True) as bar,
    ):
        for images in _embedded_images(model, source, compute, loader, cache_bytes):
            part = slice(images[0][0].start, images[-1][0].stop)

            def work(number: int, batch: PairBatch, images: list[tuple[slice, Ragged]] = images) -> np.ndarray:
                return _score_block(model, compute, batch, images, asked_of(task.place(number)), image_names)

            missing = None
            if workers.first:
                missing, done = [], 0
                for number in range(len(task)):
                    rows = task.place(number)
                    ours = _within(asked_of(rows), part)
                    if np.isnan(scores[rows][ours]).any():
                        missing.append(number)
                    else:
                        done += int(ours.sum())
                bar.update(done)
            for number, block in shared_out(workers, loader, task, workers.share(missing), work):
                scored = ~np.isnan(block)
                scores[task.place(number)][scored] = block[scored]
                bar.update(int(scored.sum()))
    return ScoreMatrix(scores, text_ids, image_names) if workers.first else None


def sampled_candidates(source: PairSource, images_per_text: int) -> np.ndarray:
    """For quick validation: (T, C) places of images, for each text its own and then random others, C in all.

    They are the same at each call, so that runs and seeds are compared on the same candidates.
    """
    rng = np.random.default_rng(0)
    images = len(source.image_names)
    candidates = np.empty((len(source.text_db), min(images_per_text, images)), np.int32)
    for row, own in enumerate(source.image_of):
        candidates[row, 0] = own
        candidates[row, 1:] = draw_others(rng, images, [own], candidates.shape[1] - 1)
    return candidates


def _within(places: np.ndarray, part: slice) -> np.ndarray:
    return (places >= part.start) & (places < part.stop)


def _embedded_images(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader, cache_bytes: int
) -> Iterator[list[tuple[slice, Ragged]]]:
    """Lists of (columns, embedded images) that fit ``cache_bytes``."""
    held: list[tuple[slice, Ragged]] = []
    size = 0
    task = BlockTask(source, "images", IMAGES_PER_BLOCK)
    for number, batch in enumerate(loader(task)):
        images = model.embed(batch, compute).images
        if held and size + images.rows.nbytes > cache_bytes:
            yield held
            held, size = [], 0
        held.append((task.place(number), images))
        size += images.rows.nbytes
    yield held


def _score_block(
    model: RetrievalModel,
    compute: Compute,
    batch: PairBatch,
    images: list[tuple[slice, Ragged]],
    asked: np.ndarray,
    image_names: Names,
) -> np.ndarray:
    """The scores of the texts of ``batch`` and the images ``asked`` for, of the same shape; NaN for images not among these."""
    texts = model.embed(batch, compute).texts
    scores = np.full(asked.shape, np.nan, np.float32)
    for part, block in images:
        chosen = _within(asked, part)
        rows, columns = chosen.nonzero()
        if len(rows):
            pairs = torch.from_numpy(np.stack([rows, asked[rows, columns] - part.start], axis=1))
            values = model.score(Embedded(texts, block), pairs, compute).scores
            scores[chosen] = _finite(values, pairs, batch.text_ids, image_names[part])
    return scores


def _finite(values: Tensor, pairs: Tensor, text_ids: tuple[str, ...], image_names: list[str]) -> np.ndarray:
    scores = values.float().cpu()
    if not bool(scores.isfinite().all()):
        text, image = pairs[int(scores.isfinite().logical_not().nonzero()[0])].tolist()
        raise InputError(
            f"the score of text {text_ids[text]!r} and image {image_names[image]!r} is not finite: damaged weights?"
        )
    return scores.numpy()

"""Score texts against images: every image is decoded and embedded once by a worker, however many texts it meets.

Shapes: T texts, I images of the split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import PairBatch, Ragged
from data.loader import Loader
from data.tasks import BlockTask, PairSource, draw_others
from evaluation.rounds import shared_out
from model.retrieval import Compute, RetrievalModel
from model.uniter import Embedded
from utils.distributed import Workers
from utils.errors import InputError
from utils.logger import progress_bar

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
    workers: Workers,
    *,
    wanted: np.ndarray | None = None,
    into: np.ndarray | None = None,
    cache_bytes: int = 4 << 30,
) -> ScoreMatrix | None:
    """Score every text of ``source`` against every image, or only the ``wanted`` (T, I) pairs; on workers but 0 returns None.

    Blocks of texts are shared out among the workers. The scores are the same to the bit for any number of them.

    Args:
        into: (T, I) float32 on worker 0, NaN where a score is still missing; blocks without NaN are left as they are.
        cache_bytes: embedded images held at a time, on the device; with more, the texts are walked through for each such part.

    Raises:
        InputError: a record that cannot be read, or a score that is not finite.
        WorkerLost: another worker has gone.
    """
    model.eval()
    text_ids, image_names = source.text_db.ids, source.image_names
    task = BlockTask(source, "texts", TEXTS_PER_BLOCK)
    scores = np.empty((0, 0), np.float32)
    if workers.first:
        scores = np.full((len(text_ids), len(image_names)), np.nan, np.float32) if into is None else into
    pairs = len(text_ids) * len(image_names)
    with progress_bar(workers.first, total=pairs, desc="scoring", unit="pair", unit_scale=True) as bar:
        for images in _embedded_images(model, source, compute, loader, cache_bytes):
            columns = slice(images[0][0].start, images[-1][0].stop)

            def work(number: int, batch: PairBatch, images: list[tuple[slice, Ragged]] = images) -> np.ndarray:
                asked = None if wanted is None else wanted[task.place(number)]
                return _score_block(model, compute, batch, images, asked, image_names)

            missing = None
            if workers.first:
                missing = [number for number in range(len(task)) if np.isnan(scores[task.place(number), columns]).any()]
            missing = workers.share(missing)
            rows_missing = sum(task.place(number).stop - task.place(number).start for number in missing)
            bar.update((len(text_ids) - rows_missing) * (columns.stop - columns.start))
            for number, block in shared_out(workers, loader, task, missing, work):
                scores[task.place(number), columns] = block
                bar.update(block.size)
    return ScoreMatrix(scores, text_ids, image_names) if workers.first else None


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
    asked: np.ndarray | None,
    image_names: list[str],
) -> np.ndarray:
    """The scores (texts of ``batch``, columns of ``images``) float32; of the pairs ``asked`` for alone, if that is given."""
    texts = model.embed(batch, compute).texts
    parts = []
    for columns, block in images:
        part = np.full((len(batch.text_ids), len(block.lengths)), -np.inf, np.float32)
        chosen = np.ones_like(part, bool) if asked is None else asked[:, columns]
        pairs = torch.from_numpy(np.argwhere(chosen))
        if len(pairs):
            values = model.score(Embedded(texts, block), pairs, compute).scores
            part[chosen] = _finite(values, pairs, batch.text_ids, image_names[columns])
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _finite(values: Tensor, pairs: Tensor, text_ids: tuple[str, ...], image_names: list[str]) -> np.ndarray:
    scores = values.float().cpu()
    if not bool(scores.isfinite().all()):
        text, image = pairs[int(scores.isfinite().logical_not().nonzero()[0])].tolist()
        raise InputError(
            f"the score of text {text_ids[text]!r} and image {image_names[image]!r} is not finite: damaged weights?"
        )
    return scores.numpy()

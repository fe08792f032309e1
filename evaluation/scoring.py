"""Score texts against images: every image is decoded and embedded once by a worker, however many texts it meets.

Shapes: T texts, I images of the split; of a block of texts P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import PairBatch, Ragged
from data.datasets import BlockDataset, draw_others
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.candidates import Candidates
from evaluation.rounds import shared_out
from evaluation.unfinished import unscored
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import Embedded
from utils.distributed import ProcessGroup
from utils.errors import InputError
from utils.logging import progress_bar

TEXTS_PER_BLOCK = 16
IMAGES_PER_BLOCK = 256


class ScoreMatrix(NamedTuple):
    """Raw outputs of the ranking head, and what they are of.

    Attributes:
        scores: (T, I) float32, -inf for pairs that are no candidates.
        regions: (I,) int32, how many each image has; 0 for an image that is nobody's candidate.
    """

    scores: np.ndarray
    text_ids: list[str]
    image_names: list[str]
    regions: np.ndarray


@torch.no_grad()
def score_matrix(
    model: RetrievalModel,
    source: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    group: ProcessGroup,
    *,
    candidates: Candidates | None = None,
    into: np.ndarray | None = None,
    cache_bytes: int = 4 << 30,
) -> ScoreMatrix | None:
    """Score every text of ``source`` against every image, or against its ``candidates``; on workers but 0 returns None.

    Blocks of texts are shared out among the workers. The scores are the same to the bit for any number of them. Time grows
    with the number of pairs; memory does not, but for the scores, which lie in a temporary file if they are large.

    Args:
        candidates: the same on every worker; images that are nobody's are not read.
        into: on worker 0, made by ``evaluation.unfinished`` for the same candidates: NaN where a score is missing; blocks of
            texts without any are left.
        cache_bytes: embedded images held at a time, on the device; with more, the texts are walked through for each such part.

    Raises:
        InputError: a record that cannot be read, a score that is not finite, or no room for the scores on disk.
        RankLost: another worker has gone.
    """
    model.eval()
    text_ids, image_names = source.text_db.ids, source.image_names
    task = BlockDataset(source, "texts", TEXTS_PER_BLOCK)
    shape = len(text_ids), len(image_names)
    scores, regions = np.empty((0, 0), np.float32), np.zeros(len(image_names), np.int32)
    if group.is_main:
        scores = unscored(shape, candidates) if into is None else into
    total = shape[0] * shape[1] if candidates is None else len(candidates.places)
    with (
        compute.inference(model),
        progress_bar(group.is_main, total=total, desc="scoring", unit="pair", unit_scale=True) as bar,
    ):
        for images in _embedded_images(model, source, compute, loader, candidates, cache_bytes):
            regions[images.places] = images.lengths()

            def work(number: int, batch: PairBatch, images: _Images = images) -> np.ndarray:
                return _score_block(model, compute, batch, images, images.pairs(task.place(number), candidates), image_names)

            missing = None
            if group.is_main:
                missing = []
                for number in range(len(task)):
                    rows, columns = images.pairs(task.place(number), candidates)
                    if np.isnan(scores[task.place(number)][rows, images.places[columns]]).any():
                        missing.append(number)
                    else:
                        bar.update(len(rows))
            for number, values in shared_out(group, loader, task, group.share(missing), work):
                rows, columns = images.pairs(task.place(number), candidates)
                scores[task.place(number)][rows, images.places[columns]] = values
                bar.update(len(rows))
    return ScoreMatrix(scores, text_ids, image_names, regions) if group.is_main else None


def sampled_candidates(source: RetrievalSplit, images_per_text: int) -> Candidates:
    """For quick validation: for each text its own image and random others, ``images_per_text`` in all if there are so many.

    They are the same at each call, so that runs and seeds are compared on the same candidates.
    """
    rng = np.random.default_rng(0)
    images = len(source.image_names)
    others = min(images_per_text, images) - 1
    return Candidates.of([np.append(draw_others(rng, images, [own], others), own) for own in source.image_of])


class _Images(NamedTuple):
    """Embedded images, ``IMAGES_PER_BLOCK`` in each of ``blocks`` but the last, and their places in the split, rising."""

    places: np.ndarray
    blocks: list[Ragged]

    def lengths(self) -> np.ndarray:
        """How many regions each has."""
        return torch.cat([block.lengths for block in self.blocks]).numpy()

    def pairs(self, texts: slice, candidates: Candidates | None) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs of these texts and images to score: (P,) texts, counted from the first of these, and (P,) images."""
        if candidates is None:
            rows, columns = np.indices((texts.stop - texts.start, len(self.places))).reshape(2, -1)
            return rows, columns
        rows, places = candidates.within(texts, self.places[0], self.places[-1])
        return rows, np.searchsorted(self.places, places)

    def take(self, images: np.ndarray) -> Ragged:
        """Some of them, in rising order."""
        taken = []
        for number in np.unique(images // IMAGES_PER_BLOCK):
            block = self.blocks[number]
            items = torch.from_numpy(images[images // IMAGES_PER_BLOCK == number] % IMAGES_PER_BLOCK)
            if len(items) < len(block.lengths):
                block = Ragged(block.rows[block.row_indices(items).to(block.rows.device)], block.lengths[items])
            taken.append(block)
        if len(taken) == 1:
            return taken[0]
        return Ragged(torch.cat([block.rows for block in taken]), torch.cat([block.lengths for block in taken]))


def _embedded_images(
    model: RetrievalModel,
    source: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    candidates: Candidates | None,
    cache_bytes: int,
) -> Iterator[_Images]:
    """The images that there are pairs of, in parts that fit ``cache_bytes``."""
    places = np.arange(len(source.image_names)) if candidates is None else np.unique(candidates.places)
    names = None if candidates is None else [source.image_names[place] for place in places.tolist()]
    task = BlockDataset(source, "images", IMAGES_PER_BLOCK, names)
    held: list[Ragged] = []
    first, size = 0, 0
    for number, batch in enumerate(loader(task)):
        images = model.embed(batch, compute).images
        if held and size + images.rows.nbytes > cache_bytes:
            yield _Images(places[first : task.place(number).start], held)
            held, first, size = [], task.place(number).start, 0
        held.append(images)
        size += images.rows.nbytes
    yield _Images(places[first:], held)


def _score_block(
    model: RetrievalModel,
    compute: ComputeSettings,
    batch: PairBatch,
    images: _Images,
    pairs: tuple[np.ndarray, np.ndarray],
    image_names: Sequence[str],
) -> np.ndarray:
    """The scores (P,) of these pairs of a text of ``batch`` and an image."""
    texts = model.embed(batch, compute).texts
    scores = np.empty(len(pairs[0]), np.float32)
    distinct, columns = np.unique(pairs[1], return_inverse=True)
    for first in range(0, len(distinct), IMAGES_PER_BLOCK):
        chosen = (columns >= first) & (columns < first + IMAGES_PER_BLOCK)
        of_block = distinct[first : first + IMAGES_PER_BLOCK]
        asked = torch.from_numpy(np.stack([pairs[0][chosen], columns[chosen] - first], axis=1))
        values = model.score(Embedded(texts, images.take(of_block)), asked, compute).scores
        names = tuple(image_names[place] for place in images.places[of_block])
        scores[chosen] = finite_scores(values, replace(batch, image_names=names, pairs=asked))
    return scores


def finite_scores(values: Tensor, batch: PairBatch) -> np.ndarray:
    """``values``, the scores (P,) of the pairs of ``batch``, as float32; ``InputError`` naming the first that is not finite."""
    scores = values.float().cpu()
    if not bool(scores.isfinite().all()):
        text, image = batch.pairs[int(scores.isfinite().logical_not().nonzero()[0])].tolist()
        raise InputError(
            f"the score of text {batch.text_ids[text]!r} and image {batch.image_names[image]!r} is not finite: damaged weights?"
        )
    return scores.numpy()

"""The score matrix of a split: computed block by block on all ranks, kept on rank 0, and resumed after a kill.

Each image is decoded and embedded once per rank, however many texts it is scored with.

Shapes: T texts, I images of the split; P pairs of one block of texts.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import PairBatch, Ragged
from data.datasets import BlockDataset
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.candidates import Candidates
from evaluation.results import check_origin
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import Embedded
from utils.distributed import ProcessGroup
from utils.errors import InputError
from utils.files import atomic_file, read_json, remove_leftovers, save_json
from utils.logging import progress_bar

TEXTS_PER_BLOCK = 16
IMAGES_PER_BLOCK = 256
IN_MEMORY_BYTES = 256 << 20
LOGGER = logging.getLogger(__name__)


class ScoreMatrix(NamedTuple):
    """Raw outputs of the ranking head for a split.

    Attributes:
        scores: (T, I) float32, -inf for pairs that are not candidates.
        regions: (I,) int32, regions per image; 0 for images that are no text's candidates.
    """

    scores: np.ndarray
    text_ids: list[str]
    image_names: list[str]
    regions: np.ndarray


@torch.no_grad()
def score_matrix(
    model: RetrievalModel,
    split: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    group: ProcessGroup,
    *,
    candidates: Candidates | None = None,
    into: np.ndarray | None = None,
    cache_bytes: int = 4 << 30,
) -> ScoreMatrix | None:
    """Score every text of ``split`` with every image, or with its ``candidates``. Collective; None on ranks other than 0.

    Blocks of texts are distributed over the ranks; the scores are bitwise the same for any number of ranks. Apart from the
    scores, which are memory-mapped if large, memory does not grow with the number of pairs.

    Args:
        candidates: the same on every rank; other images are not read.
        into: on rank 0, ``partial_scores`` of the same candidates; only blocks with NaN are computed.
        cache_bytes: size of the embedded images held on the device; larger splits are processed in parts.

    Raises ``InputError`` if a record cannot be read, a score is not finite, or the disk has no room; ``RankLost``.
    """
    model.eval()
    blocks = BlockDataset(split, "texts", TEXTS_PER_BLOCK)
    shape = len(split.text_db.ids), len(split.image_names)
    scores, regions = np.empty((0, 0), np.float32), np.zeros(shape[1], np.int32)
    if group.is_main:
        scores = blank_scores(shape, candidates) if into is None else into
    total = math.prod(shape) if candidates is None else len(candidates.images)
    done = sum(int(np.isfinite(row).sum()) for row in scores)
    bar = progress_bar(group.is_main, total=total, initial=done, desc="scoring", unit="pair", unit_scale=True)
    with bar, compute.inference(model):
        for images in _embedded_images(model, split, compute, loader, candidates, cache_bytes):
            regions[images.indices] = torch.cat([block.lengths for block in images.blocks]).numpy()

            def score(number: int, batch: PairBatch, images: _Images = images) -> np.ndarray:
                pairs = images.pairs(blocks.positions(number), candidates)
                return _score_block(model, compute, batch, images, pairs, split.image_names)

            missing = None
            if group.is_main:
                columns = slice(images.indices[0], images.indices[-1] + 1)
                missing = [n for n in range(len(blocks)) if np.isnan(scores[blocks.positions(n), columns]).any()]
            for number, values in map_over_ranks(group, loader, blocks, group.share(missing), score):
                scores[images.pairs(blocks.positions(number), candidates)] = values
                bar.update(len(values))
    return ScoreMatrix(scores, split.text_db.ids, split.image_names, regions) if group.is_main else None


def map_over_ranks(
    group: ProcessGroup,
    loader: Loader,
    dataset: Dataset[PairBatch],
    numbers: Sequence[int],
    compute: Callable[[int, PairBatch], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Compute ``compute(number, dataset[number])`` for all ``numbers``, each on one rank.

    Yields (number, result) in order on rank 0 and nothing elsewhere. Collective: every rank must exhaust the iterator. Raises
    ``InputError`` as ``dataset`` and ``compute`` do, and ``RankLost``.
    """
    # Closed here: in a destructor, where an abandoned generator ends, Python would print and drop an interruption.
    with closing(loader(dataset, numbers[group.rank :: group.world_size])) as batches:
        for first in range(0, len(numbers), group.world_size):
            of_round = numbers[first : first + group.world_size]
            own = compute(of_round[group.rank], next(batches)) if group.rank < len(of_round) else None
            yield from zip(of_round, group.gather(own), strict=False)  # the last round may be shorter than the group


class _Images(NamedTuple):
    """Embedded images, ``IMAGES_PER_BLOCK`` in each block but the last, and their ascending indices in the split."""

    indices: np.ndarray
    blocks: list[Ragged]

    def pairs(self, texts: slice, candidates: Candidates | None) -> tuple[np.ndarray, np.ndarray]:
        """Return text and image indices (P,) of the pairs to score of ``texts`` and these images."""
        if candidates is None:
            return np.arange(texts.start, texts.stop).repeat(len(self.indices)), np.tile(self.indices, texts.stop - texts.start)
        return candidates.between(texts, self.indices[0], self.indices[-1])

    def take(self, positions: np.ndarray) -> Ragged:
        """Return the images at these ascending positions."""
        numbers, items = np.divmod(positions, IMAGES_PER_BLOCK)
        rows, lengths = [], []
        for number in np.unique(numbers):
            block, chosen = self.blocks[number], torch.from_numpy(items[numbers == number])
            rows.append(block.rows[block.row_indices(chosen).to(block.rows.device)])
            lengths.append(block.lengths[chosen])
        return Ragged(torch.cat(rows), torch.cat(lengths))


def _embedded_images(
    model: RetrievalModel,
    split: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    candidates: Candidates | None,
    cache_bytes: int,
) -> Iterator[_Images]:
    """Embed the images to score, in parts of at most ``cache_bytes``."""
    indices = np.arange(len(split.image_names)) if candidates is None else np.unique(candidates.images)
    dataset = BlockDataset(split, "images", IMAGES_PER_BLOCK, [split.image_names[index] for index in indices])
    blocks: list[Ragged] = []
    start, size = 0, 0
    for number, batch in enumerate(loader(dataset)):
        images = model.embed(batch, compute).images
        if blocks and size + images.rows.nbytes > cache_bytes:
            stop = dataset.positions(number).start
            yield _Images(indices[start:stop], blocks)
            blocks, start, size = [], stop, 0
        blocks.append(images)
        size += images.rows.nbytes
    yield _Images(indices[start:], blocks)


def _score_block(
    model: RetrievalModel,
    compute: ComputeSettings,
    batch: PairBatch,
    images: _Images,
    pairs: tuple[np.ndarray, np.ndarray],
    image_names: Sequence[str],
) -> np.ndarray:
    """Score ``pairs``, text and image indices (P,) of the texts in ``batch``: → (P,)."""
    texts = model.embed(batch, compute).texts
    scores = np.empty(len(pairs[0]), np.float32)
    distinct, column_of = np.unique(pairs[1], return_inverse=True)
    for first in range(0, len(distinct), IMAGES_PER_BLOCK):
        chosen = (column_of >= first) & (column_of < first + IMAGES_PER_BLOCK)
        some = distinct[first : first + IMAGES_PER_BLOCK]
        asked = torch.from_numpy(np.stack([pairs[0][chosen] % TEXTS_PER_BLOCK, column_of[chosen] - first], axis=1))
        embedded = Embedded(texts, images.take(np.searchsorted(images.indices, some)))
        values = model.score(embedded, asked, compute).scores
        names = tuple(image_names[index] for index in some)
        scores[chosen] = finite_scores(values, replace(batch, image_names=names, pairs=asked))
    return scores


def finite_scores(values: Tensor, batch: PairBatch) -> np.ndarray:
    """Return the scores (P,) of the pairs of ``batch`` as float32; raise ``InputError`` naming the first that is not finite."""
    scores = values.float().cpu()
    if not bool(scores.isfinite().all()):
        text, image = batch.pairs[int(scores.isfinite().logical_not().nonzero()[0])].tolist()
        raise InputError(
            f"the score of text {batch.text_ids[text]!r} and image {batch.image_names[image]!r} is not finite: the checkpoint "
            "may be damaged, or the precision too low; try another checkpoint or fp32"
        )
    return scores.numpy()


@contextmanager
def partial_scores(
    folder: Path, shape: tuple[int, int], origin: dict[str, Any], candidates: Candidates | None = None
) -> Iterator[np.ndarray]:
    """Create or resume the unfinished matrix in ``folder``: (T, I) float32, memory-mapped.

    NaN if not scored yet, -inf for pairs that are not candidates. If the block fails, the matrix and its origin are kept in
    ``scores.partial.npy`` and ``scores.partial.json``; if it succeeds, or nothing has been scored, they are removed.

    Raises ``InputError`` if the matrix there is damaged or has another ``origin`` (``check_origin``), or the disk has no room.
    """
    remove_leftovers(folder, "scores.")
    matrix, note = folder / "scores.partial.npy", folder / "scores.partial.json"
    if done := _fraction_done(matrix) if note.exists() else 0.0:
        check_origin(matrix, read_json(note), origin, "use the same to resume it, or remove scores.partial.* to start over")
        LOGGER.info("resuming %s, %.1f %% done", matrix, 100 * done)
    else:
        with atomic_file(matrix) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            _write_blank(file, shape, candidates)
        save_json(note, origin)
    scores = np.lib.format.open_memmap(matrix, mode="r+")
    finished = False
    try:
        yield scores
        finished = True
    finally:
        if finished or not any(np.isfinite(row).any() for row in scores):
            remove_partial_scores(folder)


def remove_partial_scores(folder: Path) -> None:
    """Remove what an unfinished evaluation left in ``folder``, if anything."""
    for suffix in ("json", "npy"):
        (folder / f"scores.partial.{suffix}").unlink(missing_ok=True)


def _fraction_done(matrix: Path) -> float:
    try:
        scores = np.lib.format.open_memmap(matrix, mode="r")
        if scores.dtype != np.float32 or scores.ndim != 2:
            raise ValueError("not a float32 matrix")
    except (OSError, ValueError) as error:
        raise InputError(f"{matrix}: cannot be read ({error}); remove scores.partial.* to start over") from error
    scored, missing = (sum(int(is_so(row).sum()) for row in scores) for is_so in (np.isfinite, np.isnan))
    return scored / max(scored + missing, 1)


def blank_scores(shape: tuple[int, int], candidates: Candidates | None = None) -> np.ndarray:
    """Return a float32 matrix of NaN, and of -inf for pairs that are not ``candidates``, in a temporary file if it is large.

    Raises ``InputError`` if the disk has no room for it.
    """
    size = 4 * math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.array(list(_blank_rows(shape, candidates)))
    try:
        with tempfile.TemporaryFile() as file:  # has no name, and lives as long as the array
            _write_blank(file, shape, candidates)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        raise InputError(
            f"{tempfile.tempdir or 'TMPDIR'}: no room for {size:,} bytes of scores ({error.strerror or error}); set TMPDIR to "
            "a folder on a larger disk"
        ) from error


def _blank_rows(shape: tuple[int, int], candidates: Candidates | None) -> Iterator[np.ndarray]:
    for text in range(shape[0]):
        row = np.full(shape[1], np.nan if candidates is None else -np.inf, np.float32)
        if candidates is not None:
            row[candidates.of_text(text)] = np.nan
        yield row


def _write_blank(file: IO[bytes], shape: tuple[int, int], candidates: Candidates | None) -> None:
    """Write the rows in full: in a sparse file, a full disk would kill the process by SIGBUS in the middle of scoring."""
    for row in _blank_rows(shape, candidates):
        file.write(row.tobytes())
    file.flush()

"""Score matrices that are not finished: in memory, or on disk, where a killed evaluation goes on where it stopped.

``scores.partial.npy`` holds it, NaN where nothing has been scored yet and -inf where nothing is to be; ``scores.partial.json``
says what the scores are of.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from evaluation.candidates import Candidates
from utils.errors import InputError
from utils.files import atomic_file, read_json, remove_leftovers, save_json

IN_MEMORY_BYTES = 256 << 20
LOGGER = logging.getLogger(__name__)


class UnfinishedScores:
    """The unfinished evaluation in ``folder``, made if there is none. Use it as a context manager.

    A block that ends well leaves nothing behind, its results being saved elsewhere; one that does not leaves what was scored.

    Args:
        shape: texts, images.
        origin: what the scores depend on, by the words to name it with.
        candidates: the pairs to score; all if None.

    Attributes:
        scores: (T, I) float32, memory-mapped, NaN where not scored, -inf for pairs that are no candidates.

    Raises:
        InputError: an evaluation of something else was left unfinished there, or the disk has no room for the matrix.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int], origin: dict[str, Any], candidates: Candidates | None = None
    ) -> None:
        remove_leftovers(folder, "scores.")
        self.matrix, self.note = folder / "scores.partial.npy", folder / "scores.partial.json"
        done = self._share_done() if self.note.exists() else 0.0
        if not done:
            _write_unscored(self.matrix, shape, candidates)
            save_json(self.note, origin)
        else:
            noted = read_json(self.note)
            other = [name for name in origin if not isinstance(noted, dict) or noted.get(name) != origin[name]]
            if other:
                raise InputError(
                    f"{self.matrix}: of an unfinished evaluation with other {', '.join(other)}, expected the same to go on "
                    "with it; remove scores.partial.* to start anew"
                )
            LOGGER.info("going on with %s, %.1f %% of it is done", self.matrix, 100 * done)
        self.scores: np.ndarray = np.lib.format.open_memmap(self.matrix, mode="r+")

    def __enter__(self) -> UnfinishedScores:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not any(np.isfinite(row).any() for row in self.scores):
            self.note.unlink(missing_ok=True)
            self.matrix.unlink(missing_ok=True)

    def _share_done(self) -> float:
        """Which share of what is to be scored in the matrix on disk is."""
        try:
            scores = np.lib.format.open_memmap(self.matrix, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.matrix}: cannot be read ({error}); remove scores.partial.* to start anew") from error
        if scores.dtype != np.float32 or scores.ndim != 2:
            raise InputError(f"{self.matrix}: not a matrix of float32; remove scores.partial.* to start anew")
        done, missing = (sum(int(is_so(row).sum()) for row in scores) for is_so in (np.isfinite, np.isnan))
        return done / max(done + missing, 1)


def unscored(shape: tuple[int, int], candidates: Candidates | None = None) -> np.ndarray:
    """A matrix of NaN, float32, and of -inf for pairs that are no ``candidates``, in a temporary file if it is large.

    Raises ``InputError`` when there is no room for it.
    """
    if 4 * math.prod(shape) <= IN_MEMORY_BYTES:
        return np.array(list(_unscored_rows(shape, candidates)))
    try:
        with tempfile.TemporaryFile() as file:  # nameless, and gone with the array
            _write_rows(file, shape, candidates)
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        where = tempfile.tempdir or "TMPDIR"
        size = 4 * math.prod(shape)
        raise InputError(f"{where}: no room for {size:,} bytes of scores ({error.strerror or error})") from error


def _unscored_rows(shape: tuple[int, int], candidates: Candidates | None) -> Iterator[np.ndarray]:
    for text in range(shape[0]):
        row = np.full(shape[1], np.nan if candidates is None else -np.inf, np.float32)
        if candidates is not None:
            row[candidates.of_text(text)] = np.nan
        yield row


def _write_unscored(path: Path, shape: tuple[int, int], candidates: Candidates | None) -> None:
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        _write_rows(file, shape, candidates)


def _write_rows(file: IO[bytes], shape: tuple[int, int], candidates: Candidates | None) -> None:
    """Written out rather than left sparse: a full disk says so now, and not by a SIGBUS in the middle of the scoring."""
    for row in _unscored_rows(shape, candidates):
        file.write(row.tobytes())
    file.flush()

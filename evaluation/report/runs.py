"""Evaluations to report on: output folders of ``inf_itm.py``, checked against each other and their texts, and compared.

Shapes: T texts, I images. ``img`` is image retrieval, whose queries are the texts; ``txt`` is text retrieval for the images.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from data.text_db import TextDatabase
from evaluation.analysis import Bootstrap, interval
from evaluation.options import InferenceOptions
from evaluation.recall import CUTOFFS, ROWS_AT_A_TIME, positive_scores, ranks, recalls
from model.iais import Modality
from utils.errors import InputError
from utils.files import read_json, reading, short_repr

Direction = Literal["img", "txt"]
DIRECTIONS: tuple[Direction, ...] = ("img", "txt")
COLUMNS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")


class Provenance(msgspec.Struct):
    options: InferenceOptions
    checkpoint_sha256: str
    precision: str
    device: str
    commit: str | None = None


class Analysis(msgspec.Struct):
    interval_95: dict[str, list[float | None] | None]  # by the names of the recalls


class Results(msgspec.Struct):
    """The part of ``scores.json`` that a report needs, except for the recalls."""

    provenance: Provenance
    analysis: Analysis | None = None
    alignment: dict[str, dict[Modality, float]] = {}  # by regulariser


class Extremes(NamedTuple):
    """The scores of each query's best positive and of its hardest negative; -inf where none was scored."""

    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True)
class Run:
    """One evaluation; recalls and ranks as in ``evaluation.recall``, [low, high] of recalls, and the number of scored pairs."""

    name: str
    folder: Path
    recalls: dict[str, float]
    intervals: dict[str, list[float | None] | None]
    alignment: dict[str, dict[Modality, float]]
    provenance: Provenance
    pairs: int
    ranks: dict[Direction, np.ndarray]
    extremes: dict[Direction, Extremes]


def read_runs(folders: Sequence[Path]) -> tuple[TextDatabase, list[Run]]:
    """Read the runs in ``folders``, and open the text database that the first one names. Holds one score matrix at a time.

    Raises ``InputError`` if a file is missing or damaged, runs have other texts or images than the first, or the recalls in
    ``scores.json`` are not those of ``scores.npz``.
    """
    names = run_names(folders)
    text_db: TextDatabase | None = None
    runs: list[Run] = []
    for name, folder in zip(names, folders, strict=True):
        file = folder / "scores.json"
        saved = read_json(file)
        try:
            results = msgspec.convert(saved, Results)
        except msgspec.ValidationError as error:
            raise InputError(f"{file}: {error}; expected the scores.json of inf_itm.py") from error
        text_db = text_db or TextDatabase(results.provenance.options.txt_db)
        scores, ids = read_scores(folder)
        reference = folders[0] if runs else text_db.path
        _check_ids(folder / "scores.npz", ids, {"txt_ids": text_db.ids, "img_ids": text_db.images}, reference)
        found = ranks(scores, text_db.image_of)
        measured = recalls(found)
        for key, value in measured.items():
            if saved.get(key) != value:
                given = f"{key} is {short_repr(saved.get(key))}, scores.npz and {text_db.path} give {value}"
                raise InputError(f"{file}: {given}; expected files of one evaluation")
        intervals = results.analysis.interval_95 if results.analysis else {}
        of_queries: dict[Direction, np.ndarray] = {"img": found.img, "txt": found.txt}
        pairs, extremes = int(np.isfinite(scores).sum()), _extremes(scores, text_db.image_of)
        origin = results.provenance
        runs.append(Run(name, folder, measured, intervals, results.alignment, origin, pairs, of_queries, extremes))
    assert text_db is not None
    return text_db, runs


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' own names, with as many parent folders as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise InputError(f"{folders[number]}: given twice, expected different runs")
    candidates = (["/".join(path.parts[-depth:]) for path in paths] for depth in count(1))
    return next(names for names in candidates if len(set(names)) == len(names))


def read_scores(folder: Path) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Read the scores (T, I), and ``txt_ids`` and ``img_ids``."""
    file = folder / "scores.npz"
    try:
        with reading(file, "the scores of inf_itm.py") as stream, np.load(stream, allow_pickle=False) as archive:
            scores, ids = archive["scores"], {kind: archive[kind].tolist() for kind in ("txt_ids", "img_ids")}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: cannot be read as the scores of inf_itm.py ({error})") from error
    expected = (len(ids["txt_ids"]), len(ids["img_ids"]))
    if scores.shape != expected or scores.dtype != np.float32:
        raise InputError(f"{file}: scores is {scores.dtype} {list(scores.shape)}, expected float32 {list(expected)}")
    if not (scores.sum(axis=1) < np.inf).all():  # -inf marks pairs that were not scored
        raise InputError(f"{file}: scores has NaN or infinity, expected numbers")
    return scores, ids


def _check_ids(file: Path, ids: Mapping[str, list[str]], expected: Mapping[str, Sequence[str]], reference: Path) -> None:
    for kind, things in (("txt_ids", "texts"), ("img_ids", "images")):
        have, want = ids[kind], expected[kind]
        if len(have) != len(want):
            raise InputError(f"{file}: has {len(have):,} {things}, {reference} has {len(want):,}; expected the same")
        if different := [index for index, name in enumerate(want) if have[index] != name]:
            names = f"is {short_repr(have[different[0]])}, in {reference} {short_repr(want[different[0]])}"
            raise InputError(f"{file}: {kind}[{different[0]}] {names}; expected the same {things} in the same order")


def _extremes(scores: np.ndarray, image_of: np.ndarray) -> dict[Direction, Extremes]:
    texts, images = scores.shape
    own, best = positive_scores(scores, image_of)
    hard_images, hard_texts = np.empty(texts, np.float32), np.full(images, -np.inf, np.float32)
    for first in range(0, texts, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        negatives = scores[rows].copy()
        negatives[np.arange(len(negatives)), image_of[rows]] = -np.inf
        hard_images[rows] = negatives.max(axis=1)
        np.maximum(hard_texts, negatives.max(axis=0), out=hard_texts)
    return {"img": Extremes(own, hard_images), "txt": Extremes(best, hard_texts)}


class Cell(NamedTuple):
    """A recall in the table of all runs, with its interval and its difference to the first run's, if known."""

    value: float
    interval: list[float | None] | None
    difference: float | None
    difference_interval: list[float] | None  # 95 %, from resampled images
    best: bool  # no run has a higher recall and some run has a lower one

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        bounds = self.difference_interval
        return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


def compare(runs: Sequence[Run], image_of: np.ndarray) -> list[dict[str, Cell]]:
    """Return the cells of each run by column. All runs are resampled alike, so that what they have in common cancels."""
    first = runs[0]
    bootstrap = Bootstrap(int(image_of.max()) + 1)
    rows = []
    for run in runs:
        bounds = {} if run is first else _difference_intervals(run, first, image_of, bootstrap)
        row = {}
        for key in COLUMNS:
            value, values = run.recalls[key], [other.recalls[key] for other in runs]
            difference = None if run is first else value - first.recalls[key]
            row[key] = Cell(value, run.intervals.get(key), difference, bounds.get(key), min(values) < value == max(values))
        rows.append(row)
    return rows


def _difference_intervals(run: Run, first: Run, image_of: np.ndarray, bootstrap: Bootstrap) -> dict[str, list[float]]:
    cluster_of: dict[Direction, np.ndarray] = {"img": image_of, "txt": np.arange(image_of.max() + 1)}
    if len(cluster_of["txt"]) < 2:  # a single image has no spread
        return {}
    means = {}
    for direction in DIRECTIONS:
        for cutoff in CUTOFFS:
            differences = (run.ranks[direction] < cutoff).astype(float) - (first.ranks[direction] < cutoff)
            means[f"{direction}_r{cutoff}"] = bootstrap.means(differences, cluster_of[direction])
    means["r_mean"] = np.mean(list(means.values()), axis=0)
    return {key: interval(of_resamples) for key, of_resamples in means.items()}

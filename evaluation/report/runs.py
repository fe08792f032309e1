"""The output folders of ``inf_itm.py``, checked against each other and against the texts that they scored.

Shapes: T texts, I images. ``img`` is image retrieval, whose queries are the texts; ``txt`` is text retrieval for the images.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from data.text_db import TextDatabase
from evaluation.options import InferenceOptions
from evaluation.recall import ROWS_AT_A_TIME, positive_scores, ranks, recalls
from utils.errors import InputError
from utils.files import read_json, short_repr

Way = Literal["img", "txt"]


class Provenance(msgspec.Struct):
    """Of the provenance in ``scores.json``, what a report needs or shows."""

    options: InferenceOptions
    checkpoint_sha256: str
    precision: str
    device: str
    commit: str | None = None


class Analysis(msgspec.Struct):
    """Of ``evaluation.analysis.analyse``, what a report shows: intervals by the names of the recalls."""

    interval_95: dict[str, list[float | None] | None]


class Results(msgspec.Struct):
    """``scores.json``, but for the recalls."""

    provenance: Provenance
    analysis: Analysis | None = None


class Extremes(NamedTuple):
    """The scores of each query's best positive and of its best negative; -inf where none was scored."""

    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        recalls: the nine.
        intervals: of recalls by their names, [low, high], where ``scores.json`` has them.
        pairs: how many were scored.
        ranks: by way, of each query, from 0, as in ``evaluation.recall``.
        extremes: by way.
    """

    name: str
    folder: Path
    recalls: dict[str, float]
    intervals: dict[str, list[float | None] | None]
    provenance: Provenance
    pairs: int
    ranks: dict[Way, np.ndarray]
    extremes: dict[Way, Extremes]


def read_runs(folders: Sequence[Path]) -> tuple[TextDatabase, list[Run]]:
    """The runs in ``folders`` and the text database that the first of them names. Holds one score matrix at a time.

    Raises:
        InputError: a file is missing or damaged, runs are of other texts or images than the first, or recalls in
            ``scores.json`` are not those of ``scores.npz``.
    """
    names, first, text_db, runs = run_names(folders), folders[0], None, []
    for name, folder in zip(names, folders, strict=True):
        saved = read_json(folder / "scores.json")
        results = _results(folder / "scores.json", saved)
        text_db = text_db or TextDatabase(results.provenance.options.txt_db)
        scores, ids = _read_scores(folder / "scores.npz")
        for kind, expected in (("txt_ids", text_db.ids), ("img_ids", text_db.images)):
            if ids[kind] != list(expected):
                raise InputError(_difference(folder, kind, ids[kind], list(expected), text_db if folder == first else first))
        found = ranks(scores, text_db.image_of)
        measured = recalls(found)
        for key, value in measured.items():
            if saved.get(key) != value:
                given = f"{key} is {short_repr(saved.get(key))}, scores.npz and {text_db.path} give {value}"
                raise InputError(f"{folder / 'scores.json'}: {given}; expected files of one evaluation")
        intervals = results.analysis.interval_95 if results.analysis else {}
        by_way: dict[Way, np.ndarray] = {"img": found.img, "txt": found.txt}
        extremes = _extremes(scores, text_db.image_of)
        pairs = int(np.isfinite(scores).sum())
        runs.append(Run(name, folder, measured, intervals, results.provenance, pairs, by_way, extremes))
    assert text_db is not None
    return text_db, runs


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of the folders above as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise InputError(f"{folders[number]}: given twice, expected different runs")
    candidates = (["/".join(path.parts[-depth:]) for path in paths] for depth in count(1))
    return next(names for names in candidates if len(set(names)) == len(names))


def read_matrix(run: Run) -> np.ndarray:
    """The scores (T, I) of a run that ``read_runs`` has checked."""
    return _read_scores(run.folder / "scores.npz")[0]


def _results(file: Path, saved: Any) -> Results:
    try:
        return msgspec.convert(saved, Results)
    except msgspec.ValidationError as error:
        raise InputError(f"{file}: {error}; expected the scores.json of inf_itm.py") from error


def _read_scores(file: Path) -> tuple[np.ndarray, dict[str, list[str]]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            scores, ids = archive["scores"], {kind: archive[kind].tolist() for kind in ("txt_ids", "img_ids")}
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file, expected the scores of inf_itm.py") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: cannot be read as the scores of inf_itm.py ({error})") from error
    expected = (len(ids["txt_ids"]), len(ids["img_ids"]))
    if scores.shape != expected or scores.dtype != np.float32:
        raise InputError(f"{file}: scores is {scores.dtype} {list(scores.shape)}, expected float32 {list(expected)}")
    if not (scores.sum(axis=1) < np.inf).all():  # -inf stands where a pair was not scored
        raise InputError(f"{file}: scores has NaN or infinity, expected numbers")
    return scores, ids


def _difference(folder: Path, kind: str, ids: list[str], expected: list[str], of: TextDatabase | Path) -> str:
    """What to say where ``ids`` are not ``expected``."""
    things = "texts" if kind == "txt_ids" else "images"
    other = of.path if isinstance(of, TextDatabase) else of
    if len(ids) != len(expected):
        return f"{folder / 'scores.npz'}: has {len(ids):,} {things}, {other} has {len(expected):,}; expected the same"
    place = next(place for place, (one, another) in enumerate(zip(ids, expected, strict=True)) if one != another)
    told = f"{kind}[{place}] is {short_repr(ids[place])}, in {other} {short_repr(expected[place])}"
    return f"{folder / 'scores.npz'}: {told}; expected the same {things} in the same order"


def _extremes(scores: np.ndarray, image_of: np.ndarray) -> dict[Way, Extremes]:
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

"""Make the page: ``write_report``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.picture_names import find_pictures
from data.text_db import TextDatabase
from evaluation.recall import CUTOFFS
from evaluation.report.attention import word_attention
from evaluation.report.captions import Captions, displayable
from evaluation.report.charts import count_ranks, rank_chart, score_chart
from evaluation.report.comparison import COLUMNS, compare
from evaluation.report.pictures import save_thumbnails
from evaluation.report.queries import WAYS, HardQuery, hardest_queries
from evaluation.report.runs import Extremes, Run, Way, read_runs
from evaluation.report.view import View, pair_of
from utils.files import atomic_file, atomic_folder

QUERIES = 50
_HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], output: Path, images: Path | None = None, queries: int = QUERIES) -> None:
    """Write folder ``output``, whose ``index.html`` needs nothing from outside it, about the output folders of ``inf_itm.py``.

    Time and memory grow with the largest score matrix, of which one is held at a time, and with ``queries``.

    Args:
        runs: of the same texts and images; differences are to the first.
        images: folder of pictures, for thumbnails.
        queries: how many of the hardest to show in each direction.

    Raises:
        InputError: ``output`` exists, a file is missing or damaged, or the runs do not belong together.
    """
    with atomic_folder(output) as folder:
        text_db, read = read_runs(runs)
        with closing(text_db):
            page = _page(text_db, read, folder, images, queries)
        with atomic_file(folder / "index.html") as file:
            file.write(page.encode())


def _page(text_db: TextDatabase, runs: Sequence[Run], folder: Path, images: Path | None, queries: int) -> str:
    hard = hardest_queries(runs, text_db.image_of, queries)
    shown = sorted({text_db.images[image] for run in range(len(runs)) for _, image in _pairs(hard, run)})
    pictures = find_pictures(images, shown) if images else {}
    thumbnails = save_thumbnails(pictures, folder) if images else {}
    attention, reasons = zip(
        *(word_attention(run, text_db, _pairs(hard, number)) for number, run in enumerate(runs)), strict=True
    )
    view = View(runs, text_db, Captions(text_db), thumbnails, attention)
    counted = {way: count_ranks(runs, way) for way in WAYS}
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed}
    return environment.get_template("template.html").render(
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        split=displayable(text_db.path.name),
        texts=len(text_db),
        images=len(text_db.images),
        runs=runs,
        reasons=reasons,
        pictures={"asked": images is not None, "found": len(thumbnails), "shown": len(shown)},
        columns=COLUMNS,
        cutoffs=CUTOFFS,
        rows=compare(runs, text_db.image_of),
        ways=WAYS,
        ranks={way: (counted[way], rank_chart([run.name for run in runs], counted[way])) for way in WAYS},
        scores=[{way: (score_chart(run.extremes[way]), _summary(run.extremes[way])) for way in WAYS} for run in runs],
        hard={way: [view.query(way, number, query) for number, query in enumerate(hard[way])] for way in WAYS},
    )


def _pairs(hard: dict[Way, list[HardQuery]], run: int) -> set[tuple[int, int]]:
    """The pairs that the page shows of a run."""
    return {pair_of(way, query.place, answer.place) for way in WAYS for query in hard[way] for answer in query.answers[run]}


def _summary(extremes: Extremes) -> dict[str, Any]:
    """Medians, "–" where nothing was scored, and the share of queries in which a negative scores at least as high."""
    scored = [scores[scores > -np.inf] for scores in extremes]
    positive, negative = (_number(float(np.median(scores)), 2) if len(scores) else "–" for scores in scored)
    return {"positive": positive, "negative": negative, "wrong": float((extremes.negatives >= extremes.positives).mean())}


def _number(number: float, digits: int) -> str:
    """With a minus that is as long as a plus."""
    return f"{number:.{digits}f}".replace("-", "−")


def _signed(number: float) -> str:
    """Percentage points with their sign, but for what rounds to zero."""
    points = round(100 * number, 2)
    return ("+" if points > 0 else "") + _number(points or 0.0, 2)

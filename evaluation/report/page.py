"""The page: ``write_report`` reads evaluations and writes a folder of HTML and thumbnails."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.picture_names import find_pictures
from data.text_db import TextDatabase
from evaluation.plots.regions import read_picture
from evaluation.recall import CUTOFFS
from evaluation.report.charts import count_ranks, rank_chart, score_chart
from evaluation.report.queries import Captions, HardQuery, Pair, displayable, hardest_queries, word_attention
from evaluation.report.runs import COLUMNS, DIRECTIONS, Direction, Extremes, Run, compare, read_runs
from evaluation.tables import fixed
from utils.errors import InputError, counted
from utils.files import atomic_file, atomic_folder

LOGGER = logging.getLogger(__name__)
QUERIES = 50
THUMBNAIL = 400  # pixels per side, at most
Thumbnail = tuple[str, int, int]  # its path relative to the page, its width and height in pixels
_HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], output: Path, images: Path | None = None, queries: int = QUERIES) -> None:
    """Write folder ``output``, whose self-contained ``index.html`` is about the output folders of ``inf_itm.py`` in ``runs``.

    The runs are of the same texts and images; differences are to the first. ``images`` is a folder of pictures, for thumbnails;
    ``queries`` the number of hardest queries per direction. Time and memory grow with it and with the largest score matrix, of
    which one is held at a time. Raises ``InputError`` if ``output`` exists, a file is missing or damaged, or runs do not match.
    """
    with atomic_folder(output) as folder:
        text_db, read = read_runs(runs)
        with closing(text_db):
            page = _page(text_db, read, folder, images, queries)
        with atomic_file(folder / "index.html") as file:
            file.write(page.encode())


def _page(text_db: TextDatabase, runs: Sequence[Run], folder: Path, images: Path | None, queries: int) -> str:
    hard = hardest_queries(runs, text_db.image_of, queries)
    pairs: list[set[Pair]] = [
        {pair for direction in DIRECTIONS for query in hard[direction] for pair in query.pairs(direction, run)}
        for run in range(len(runs))
    ]
    shown = sorted({text_db.images[image] for of_run in pairs for _, image in of_run})
    thumbnails = _save_thumbnails(find_pictures(images, shown), folder) if images else {}
    attention, reasons = zip(*(word_attention(*of_run, text_db) for of_run in zip(runs, pairs, strict=True)), strict=True)
    view = _View(runs, text_db, Captions(text_db), thumbnails, attention)
    rank_counts = {direction: count_ranks(runs, direction) for direction in DIRECTIONS}
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "signed": _signed, "counted": counted}
    return environment.get_template("template.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        split=displayable(text_db.path.name),
        texts=len(text_db),
        images=len(text_db.images),
        runs=runs,
        reasons=reasons,
        pictures={"requested": images is not None, "found": len(thumbnails), "shown": len(shown)},
        columns=COLUMNS,
        cutoffs=CUTOFFS,
        rows=compare(runs, text_db.image_of),
        directions=DIRECTIONS,
        regularisers=list(dict.fromkeys(name for run in runs for name in run.alignment)),
        ranks={key: (counts, rank_chart([run.name for run in runs], counts)) for key, counts in rank_counts.items()},
        scores=[{key: (score_chart(extremes), _summary(extremes)) for key, extremes in run.extremes.items()} for run in runs],
        hard={key: [view.query(key, number, query) for number, query in enumerate(hard[key])] for key in DIRECTIONS},
    )


def _save_thumbnails(pictures: Mapping[str, Path], page: Path) -> dict[str, Thumbnail]:
    """Write small copies of ``pictures`` (image → file) into ``images/`` next to the page; warn of those that are damaged."""
    (page / "images").mkdir()
    thumbnails = {}
    for number, (name, path) in enumerate(sorted(pictures.items())):
        try:
            picture = read_picture(path)
        except InputError as error:
            LOGGER.warning("%s; the report has a frame with its name instead", error)
            continue
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        source = f"images/{number}.jpg"  # the name of an image may be special to a file system or in a URL
        with atomic_file(page / source) as file:
            picture.save(file, "JPEG", quality=82)
        thumbnails[name] = (source, *picture.size)
    return thumbnails


@dataclass(frozen=True)
class _View:
    """What the template and the script show of the hardest queries; ``attention`` has a mapping per run."""

    runs: Sequence[Run]
    text_db: TextDatabase
    captions: Captions
    thumbnails: Mapping[str, Thumbnail]
    attention: Sequence[Mapping[Pair, dict[str, Any]]]

    def query(self, direction: Direction, number: int, query: HardQuery) -> dict[str, Any]:
        pairs: list[dict[str, Any]] = []
        for index, run in enumerate(self.runs):
            for answer, (text, image) in zip(query.answers[index], query.pairs(direction, index), strict=True):
                facts = {"run": run.name, "pair": len(pairs), "caption": self.captions[text], **answer._asdict()}
                facts |= {"precisely": _number(answer.score, 3), "attention": self.attention[index].get((text, image))}
                pairs.append({**facts, **self.image(image)})
        asked = self.image(query.query) if direction == "txt" else {"caption": self.captions[query.query]}
        return {"id": f"{direction}-{number}", "asked": asked, "ranks": query.ranks, "pairs": pairs}

    def image(self, index: int) -> dict[str, Any]:
        name, described = self.text_db.images[index], self.captions.of_image(index)
        return {"image": displayable(name), "described": described, "thumbnail": self.thumbnails.get(name)}


def _summary(extremes: Extremes) -> dict[str, Any]:
    """Medians, "–" where nothing was scored, and the share of queries in which a negative scores at least as high."""
    scored = [scores[scores > -np.inf] for scores in extremes]
    positive, negative = (_number(float(np.median(scores)), 2) if len(scores) else "–" for scores in scored)
    return {"positive": positive, "negative": negative, "wrong": float((extremes.negatives >= extremes.positives).mean())}


def _number(number: float, digits: int) -> str:
    """Format with a true minus sign."""
    return fixed(number, digits).replace("-", "−")


def _signed(number: float) -> str:
    """Format as percentage points with their sign; zero has none."""
    return fixed(100 * number, 2, sign=True).replace("-", "−")

"""What the page shows of the hardest queries, as the template and the script take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.text_db import TextDatabase
from evaluation.plots.regions import ASPECT
from evaluation.report.attention import Pair, WordAttention
from evaluation.report.captions import Captions, displayable
from evaluation.report.pictures import Thumbnail
from evaluation.report.queries import Answer, HardQuery
from evaluation.report.runs import Run, Way


def pair_of(way: Way, query: int, answer: int) -> Pair:
    """The places of the text and of the image that ``query`` and ``answer`` are."""
    return (query, answer) if way == "img" else (answer, query)


@dataclass(frozen=True)
class View:
    """The sources of what is shown; ``attention`` has a map for each run."""

    runs: Sequence[Run]
    text_db: TextDatabase
    captions: Captions
    thumbnails: Mapping[str, Thumbnail]
    attention: Sequence[Mapping[Pair, WordAttention]]

    def query(self, way: Way, number: int, query: HardQuery) -> dict[str, Any]:
        """A query: what is asked with, and by run its answers; ``pairs`` is for the script, the rest for the template."""
        pairs: list[dict[str, Any]] = []
        of_runs = []
        for place, (run, rank, answers) in enumerate(zip(self.runs, query.ranks, query.answers, strict=True)):
            shown = []
            for answer in answers:
                text, image = pair_of(way, query.place, answer.place)
                shown.append({**answer._asdict(), "pair": len(pairs), "caption": self.captions[text], **self.image(image)})
                pairs.append(self.pair(place, (text, image), answer))
            of_runs.append({"name": run.name, "rank": rank, "answers": shown})
        asked = self.image(query.place) if way == "txt" else {"caption": self.captions[query.place]}
        return {"id": f"{way}-{number}", "asked": asked, "ranks": query.ranks, "runs": of_runs, "pairs": pairs}

    def image(self, place: int) -> dict[str, Any]:
        """An image's name, its first caption, and its thumbnail if there is one."""
        name = self.text_db.images[place]
        return {
            "image": displayable(name),
            "described": self.captions.of_image(place),
            "thumbnail": self.thumbnails.get(name),
        }

    def pair(self, run: int, pair: Pair, answer: Answer) -> dict[str, Any]:
        """A pair as the overlay shows it; ``attention`` is null where there is none."""
        text, image = pair
        thumbnail = self.thumbnails.get(self.text_db.images[image])
        attention = self.attention[run].get(pair)
        return {
            "run": self.runs[run].name,
            "rank": answer.rank,
            "score": answer.score,
            "right": answer.right,
            "caption": self.captions[text],
            "image": displayable(self.text_db.images[image]),
            "picture": thumbnail and thumbnail.source,
            "size": [thumbnail.width, thumbnail.height] if thumbnail else [round(300 * ASPECT), 300],
            "attention": attention and attention._asdict(),
        }

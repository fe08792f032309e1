"""Images of a database by a caption, from the command line."""

from __future__ import annotations

import io
import json
import sys

import pytest

from data.image_db import ImageDatabase
from evaluation.retriever import Retriever
from scripts.search import main
from tests.conftest import BUNDLED
from tests.test_programs import fails

MODEL = [
    "--checkpoint",
    str(BUNDLED.folder / "model.pt"),
    "--model_config",
    str(BUNDLED.folder / "model.json"),
    "--device",
    "cpu",
]
DB = str(BUNDLED.image_db)
CAPTIONS = ["a dog catching a frisbee", "two men"]


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_tables_and_json_are_the_ranking(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = Retriever.from_checkpoint(BUNDLED.folder / "model.pt", BUNDLED.folder / "model.json", device="cpu")
    expected = retriever.rank_each(CAPTIONS, ImageDatabase(DB), 7)
    main([DB, *CAPTIONS, *MODEL, "--top", "7"])
    shown = capsys.readouterr().out.split("\n\n")
    for part, caption, found in zip(shown, CAPTIONS, expected, strict=True):
        title, *rows = part.strip("\n").split("\n")
        assert title == caption
        assert [row.split() for row in rows] == [
            [str(place), image.name, f"{image.score:.4f}", f"{image.sigmoid:.4f}"] for place, image in enumerate(found, start=1)
        ]
    stdin(monkeypatch, "\n".join(["", *CAPTIONS, " \r"]).encode())
    main([DB, *MODEL, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == CAPTIONS
    for line, found in zip(lines, expected, strict=True):
        assert len(line["images"]) == 10
        for image, of in zip(line["images"], found, strict=False):
            assert image == {"name": of.name, "score": of.score, "sigmoid": of.sigmoid}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no image database is given, expected: search.py DB CAPTION"),
        ([*MODEL, DB], "unknown option "),
        ([DB, "a dog", *MODEL[2:]], "checkpoint is missing"),
        ([DB, "a dog", *MODEL, "--top", "0"], "top is 0, expected at least 1"),
        ([DB, "a dog", *MODEL, "--topp", "1"], "unknown option --topp (did you mean '--top'?)"),
        ([DB + "x", "a dog", *MODEL], "heldoutx: no such image database"),
        ([DB, "a dog", "", *MODEL], "text '' has no word pieces"),
        ([DB, *MODEL], "standard input has no caption, expected one a line"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_one_line_for_every_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    stdin(monkeypatch, b"\n \n")
    assert said in fails(capsys, main, words or MODEL)


def test_captions_that_are_not_utf_8(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "caf\u00e9\n".encode("latin-1"))
    assert "text 'caf\\udce9' is not Unicode" in fails(capsys, main, [DB, *MODEL])

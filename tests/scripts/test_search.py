"""Images of a database by caption, from the command line."""

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

WEIGHTS, ARCHITECTURE, DB = (
    str(path) for path in (BUNDLED.folder / "model.pt", BUNDLED.folder / "model.json", BUNDLED.image_db)
)
MODEL = ["--checkpoint", WEIGHTS, "--model_config", ARCHITECTURE, "--device", "cpu"]
CAPTIONS = ["a dog catching a frisbee", "two men"]


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_tables_and_json_are_the_ranking(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = Retriever.from_checkpoint(WEIGHTS, ARCHITECTURE, device="cpu")
    expected = retriever.rank_each(CAPTIONS, ImageDatabase(DB), 10)
    main([DB, *CAPTIONS, *MODEL, "--top", "7"])
    for part, caption, ranked in zip(capsys.readouterr().out.split("\n\n"), CAPTIONS, expected, strict=True):
        title, *rows = part.strip("\n").split("\n")
        assert title == caption
        assert [row.split() for row in rows] == [
            [str(rank), image.name, f"{image.score:.4f}", f"{image.sigmoid:.4f}"]
            for rank, image in enumerate(ranked[:7], start=1)
        ]
    whole = [DB, *CAPTIONS, "--help", *MODEL, "--top", "2"]
    for words in ([*whole[:3], *whole[4:], "--", "--help"], [*MODEL, DB, "--top=2", *CAPTIONS, "--", "--help"]):
        main(words)
        parts = capsys.readouterr().out.split("\n\n")
        assert [(part.split("\n")[0], part.strip("\n").count("\n")) for part in parts] == [
            (c, 2) for c in (*CAPTIONS, "--help")
        ]
    set_stdin(monkeypatch, "\n".join(["", *CAPTIONS, " \r"]).encode())
    main([DB, *MODEL, "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"text": caption, "images": [{"name": it.name, "score": it.score, "sigmoid": it.sigmoid} for it in ranked]}
        for caption, ranked in zip(CAPTIONS, expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (MODEL, "no image database given, expected: search.py DB"),
        ([DB, "a dog", *MODEL, "--tap", "3"], "did you mean '--top'?"),
        ([DB, "a dog", *MODEL[2:]], "checkpoint is missing"),
        ([DB, "a dog", *MODEL, "--top", "0"], "top is 0, expected at least 1"),
        ([DB + "x", "a dog", *MODEL], "heldoutx: no such image database"),
        ([DB, "a dog", "", *MODEL], "text '' has no word pieces"),
        ([DB, *MODEL], "text 'caf\\udce9' is not Unicode"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_one_line_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    set_stdin(monkeypatch, "caf\u00e9\n".encode("latin-1"))
    assert message in fails(capsys, main, words)
    set_stdin(monkeypatch, b"\n \n")
    assert "standard input has no caption" in fails(capsys, main, [DB, *MODEL])

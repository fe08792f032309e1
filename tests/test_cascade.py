"""``inf_itm.py`` with --candidates and --report: the second stage of a cascade, and a page about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import inf_itm
from data.text_db import TextDatabase
from tests.conftest import BUNDLED
from tests.test_programs import fails, inference


def test_listed_pairs_alone_with_a_report(
    tmp_path: Path, few_texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TextDatabase(few_texts)
    own = [texts.images[image] for image in texts.image_of]
    others = list(texts.images)
    lines = [
        {"text": text, "images": [name for name in dict.fromkeys([image, *others[:3]]) if number % 4 or name != image]}
        for number, (text, image) in enumerate(zip(texts.ids, own, strict=True))
    ]
    listed = tmp_path / "first-stage.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    options = inference(few_texts, BUNDLED.image_db, output, candidates=listed)
    inf_itm.main([*options, "--report"])

    printed = capsys.readouterr().out
    results = json.loads((output / "scores.json").read_text())
    pairs = sum(len(line["images"]) for line in lines)
    unlisted = len(lines[::4])
    assert (results["counts"]["pairs"], results["counts"]["texts_without_their_image"]) == (pairs, unlisted)
    ceiling = 1 - unlisted / len(lines)
    assert results["counts"]["at_most"]["img"] == pytest.approx(ceiling)
    assert results["img_r10"] == pytest.approx(ceiling)  # four at most are listed, so the first ten hold all of them
    assert f"{100 * ceiling:.2f}" in printed
    assert results["analysis"]["unranked"]["img"] == unlisted
    assert len(results["analysis"]["interval_95"]["r_mean"]) == 2
    scores = np.load(output / "scores.npz")["scores"]
    assert np.isfinite(scores).sum() == pairs
    page = (output / "report/index.html").read_text()
    assert "listed pairs alone" in page

    def scored_again(*_: object, **__: object) -> None:
        raise AssertionError("scores although it could not write the report")

    monkeypatch.setattr(inf_itm, "score_matrix", scored_again)
    assert "report: already exists" in fails(capsys, inf_itm.main, [*options, "--report"])
    elsewhere = [*options[:-1], options[-1], "--output_dir", str(tmp_path / "new"), "--report", str(tmp_path / "nowhere")]
    assert "nowhere: no such folder, expected one with pictures" in fails(capsys, inf_itm.main, elsewhere)
    assert not (tmp_path / "new").exists()

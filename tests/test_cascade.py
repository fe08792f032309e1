"""``inf_itm.py`` with --candidates and --report: the second stage of a cascade, and a report about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import inf_itm
from data.text_db import TextDatabase
from tests.conftest import BUNDLED
from tests.test_programs import fails, inference


def test_candidates_with_a_report(
    tmp_path: Path, few_texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TextDatabase(few_texts)
    names, listed, output = list(texts.images), tmp_path / "first-stage.jsonl", tmp_path / "out"
    lines = []
    for number, (text, image) in enumerate(zip(texts.ids, texts.image_of, strict=True)):
        images = dict.fromkeys([names[image], *names[:3]])
        if number % 4 == 0:
            del images[names[image]]
        lines.append({"text": text, "images": list(images)})
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = inference(few_texts, BUNDLED.image_db, output, candidates=listed)
    inf_itm.main([*options, "--report"])

    results, printed = json.loads((output / "scores.json").read_text()), capsys.readouterr().out
    pairs, unlisted = sum(len(line["images"]) for line in lines), len(lines[::4])
    ceiling = 1 - unlisted / len(lines)
    assert (results["counts"]["pairs"], results["counts"]["texts_without_their_image"]) == (pairs, unlisted)
    assert results["counts"]["at_most"]["img"] == pytest.approx(ceiling)
    assert results["img_r10"] == pytest.approx(ceiling)  # at most four are listed, so all are among the first ten
    assert f"{100 * ceiling:.2f}" in printed
    assert results["analysis"]["unranked"]["img"] == unlisted
    assert len(results["analysis"]["interval_95"]["r_mean"]) == 2
    assert np.isfinite(np.load(output / "scores.npz")["scores"]).sum() == pairs
    assert "listed pairs alone" in (output / "report/index.html").read_text()

    monkeypatch.setattr(inf_itm, "score_matrix", lambda *_, **__: pytest.fail("scored although it is useless"))
    inf_itm.main([*options, "--report"])
    assert capsys.readouterr().out == printed
    elsewhere = [*options, "--output_dir", str(tmp_path / "new"), "--report", str(tmp_path / "nowhere")]
    assert "nowhere: no such folder, expected a folder of pictures" in fails(capsys, inf_itm.main, elsewhere)
    assert not (tmp_path / "new").exists()

"""The score matrix: which pairs are scored, where it is stored, resuming; and the alignment of positives."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lmdb
import numpy as np
import pytest
import torch

import inf_itm
from data.image_db import ImageDatabase
from data.loader import Loader
from data.split import RetrievalSplit
from data.text_db import TextDatabase
from evaluation import scoring
from evaluation.alignment import alignment_of_positives
from evaluation.candidates import Candidates, sampled_candidates
from evaluation.scoring import partial_scores, score_matrix
from model.iais import REGULARISERS, Regulariser
from model.retrieval import ComputeSettings, RetrievalModel
from tests import naive
from tests.conftest import BUNDLED
from tests.processes import LAUNCHERS, Forked, die_at_call, finish, run
from tests.test_programs import fails, inference
from tests.test_ranks import first_texts
from utils.distributed import SingleProcess
from utils.errors import InputError
from utils.files import sha256


def ragged_candidates(split: RetrievalSplit) -> Candidates:
    """Return none to six images per text, of 31 images; two blocks of texts have none at all."""
    rng = np.random.default_rng(3)
    kept = np.delete(np.arange(40), [0, 7, 8, 20, 21, 22, 33, 38, 39])
    counts = [rng.integers(0, 7) if not 16 <= text < 48 else 0 for text in range(len(split.text_db))]
    return Candidates.of([rng.choice(kept, count, replace=False) for count in counts])


@pytest.mark.parametrize("cache_bytes", [1 << 30, 50_000], ids=["at once", "in parts"])
@pytest.mark.parametrize("block", [5, 256])
def test_only_candidates_are_scored_and_only_their_images_read(
    compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch, block: int, cache_bytes: int
) -> None:
    split, model = BUNDLED.source(), BUNDLED.model()
    candidates = ragged_candidates(split)
    rows = [BUNDLED.arrays["eval/txt_ids"].tolist().index(name) for name in split.text_db.ids]
    columns = [BUNDLED.arrays["eval/img_ids"].tolist().index(name) for name in split.image_names]
    expected = BUNDLED.arrays["eval/scores"][np.ix_(rows, columns)]
    regions = [len(split.image_db[name].boxes) for name in split.image_names]
    listed = np.zeros((200, 40), bool)
    for text in range(200):
        listed[text, candidates.of_text(text)] = True
    read: list[str] = []
    scored: list[int] = []
    look_up, score_pairs = ImageDatabase.__getitem__, RetrievalModel.score
    monkeypatch.setattr(ImageDatabase, "__getitem__", lambda db, name: (read.append(name), look_up(db, name))[1])
    monkeypatch.setattr(
        RetrievalModel, "score", lambda self, e, pairs, how: (scored.append(len(pairs)), score_pairs(self, e, pairs, how))[1]
    )
    monkeypatch.setattr(scoring, "IMAGES_PER_BLOCK", block)
    some = score_matrix(model, split, compute, loader, SingleProcess(), candidates=candidates, cache_bytes=cache_bytes)
    np.testing.assert_allclose(some.scores[listed], expected[listed], rtol=1e-5, atol=1e-5)
    assert (some.scores[~listed] == -np.inf).all()
    assert read == [split.image_names[index] for index in np.flatnonzero(listed.any(axis=0))]
    assert sum(scored) == listed.sum()
    assert some.regions.tolist() == np.where(listed.any(axis=0), regions, 0).tolist()
    assert score_matrix(model, first_texts(split, 2), compute, loader, SingleProcess()).regions.tolist() == regions


def test_scores_must_be_finite(compute: ComputeSettings, loader: Loader) -> None:
    model = BUNDLED.model()
    torch.nn.init.constant_(model.rank_output.bias, float("nan"))
    with pytest.raises(InputError, match=r"the score of text '0' and image .* is not finite"):
        score_matrix(model, BUNDLED.source(), compute, loader, SingleProcess())


def test_large_matrix_is_in_a_file(monkeypatch: pytest.MonkeyPatch, compute: ComputeSettings, loader: Loader) -> None:
    split, model = first_texts(BUNDLED.source(), 20), BUNDLED.model()
    in_memory = score_matrix(model, split, compute, loader, SingleProcess())
    monkeypatch.setattr(scoring, "IN_MEMORY_BYTES", in_memory.scores.nbytes - 1)
    on_disk = score_matrix(model, split, compute, loader, SingleProcess())
    assert (isinstance(in_memory.scores, np.memmap), isinstance(on_disk.scores, np.memmap)) == (False, True)
    assert np.array_equal(in_memory.scores, on_disk.scores)


def test_full_disk_fails_before_scoring() -> None:
    program = (
        "import resource, signal; from evaluation import scoring; scoring.IN_MEMORY_BYTES = 0;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "scoring.blank_scores((200, 100))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "InputError" in done.stderr
    assert "no room for 80,000 bytes of scores" in done.stderr


def test_interrupted_evaluation_of_candidates_resumes(tmp_path: Path, compute: ComputeSettings, loader: Loader) -> None:
    split, model = BUNDLED.source(), BUNDLED.model()
    candidates = ragged_candidates(split)

    def begin(of: Candidates) -> AbstractContextManager[np.ndarray]:
        return partial_scores(tmp_path, (200, 40), {"candidates": of.fingerprint()}, of)

    def evaluate(into: np.ndarray | None = None) -> np.ndarray:
        return score_matrix(model, split, compute, loader, SingleProcess(), candidates=candidates, into=into).scores

    whole = evaluate()
    with pytest.raises(KeyboardInterrupt), begin(candidates):  # leaves nothing, as nothing has been scored
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with suppress(KeyboardInterrupt), begin(candidates) as scores:
        scores[:64] = whole[:64] + 1  # blocks 0 and 3, the two between have no candidates
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="another candidates; use the same to resume it"), begin(sampled_candidates(split, 3)):
        pass
    with begin(candidates) as scores:
        assert np.array_equal(evaluate(scores), np.r_[whole[:64] + 1, whole[64:]])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few_texts: Path) -> Path:
    """An uninterrupted evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    inf_itm.main(inference(few_texts, BUNDLED.image_db, folder))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, few_texts: Path) -> Path:
    """The same evaluation, killed after two blocks of texts."""
    folder = tmp_path_factory.mktemp("killed") / "out"
    prepare = partial(die_at_call, "evaluation.scoring._score_block", 3)
    options = inference(few_texts, BUNDLED.image_db, folder)
    finish(Forked("inf_itm", *options, prepare=prepare), 60, code=-signal.SIGKILL)
    return folder


@pytest.fixture
def begun(tmp_path: Path, killed: Path) -> Path:
    """A copy of the killed evaluation, to resume."""
    return Path(shutil.copytree(killed, tmp_path / "out"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_resume_what_one_process_began(begun: Path, whole: Path, few_texts: Path, launcher: str) -> None:
    output = run(launcher, 2, sys.executable, "inf_itm.py", *inference(few_texts, BUNDLED.image_db, begun))
    assert "resuming" in output
    assert output.count("counted as published") == 1
    first, second = (np.load(folder / "scores.npz")["scores"] for folder in (whole, begun))
    assert np.array_equal(first, second)
    of_one, of_other = (json.loads((folder / "scores.json").read_text()) for folder in (whole, begun))
    for key in of_one.keys() - {"seconds", "provenance"}:
        assert of_one[key] == of_other[key]
    assert {path.name for path in begun.iterdir()} == {"scores.npz", "scores.json"}


def test_resumes_and_replaces_only_with_the_same_model_and_data(
    tmp_path: Path, begun: Path, whole: Path, few_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    torch.save(state | {"rank_output.bias": state["rank_output.bias"] + 1}, tmp_path / "other.pt")
    other_texts, other_images, moved = (tmp_path / name for name in ("other.db", "images", "moved.db"))
    shutil.copytree(few_texts, other_texts)
    lengths = json.loads((few_texts / "id2len.json").read_text())
    (other_texts / "id2len.json").write_text(json.dumps(dict(sorted(lengths.items(), reverse=True))))
    shutil.copytree(BUNDLED.image_db, other_images)
    store = next(other_images.glob("*/data.mdb")).parent
    with lmdb.open(str(store), map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"another.npz", b"")
    shutil.copytree(BUNDLED.image_db, tmp_path / "fewer")
    for path in list((tmp_path / "fewer").iterdir()):
        path.rename(path.with_name(path.name.replace("max100", "max99")))

    def options(**changes: object) -> list[str]:
        given = {"txt_db": few_texts, "img_db": BUNDLED.image_db, "output": begun} | changes
        return inference(given.pop("txt_db"), given.pop("img_db"), given.pop("output"), **given)

    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"text": next(iter(lengths)), "images": TextDatabase(few_texts).images[:2]})
    )
    before = [(begun / "scores.partial.npy").read_bytes(), (whole / "scores.npz").read_bytes()]
    for output, (name, other) in product(
        (begun, whole),
        {
            "checkpoint": tmp_path / "other.pt", "precision": "bf16", "txt_db": other_texts, "img_db": other_images,
            "candidates": tmp_path / "pairs.jsonl",
        }.items(),
    ):  # fmt: skip
        line = fails(capsys, inf_itm.main, options(output=output, **{name: other}))
        assert f"belongs to an evaluation with another {name}" in line
        assert ("checkpoint (was /" in line and f", is {other})" in line) == (name == "checkpoint" and output == whole)
    line = fails(capsys, inf_itm.main, options(img_db=tmp_path / "fewer", max_bb=99))
    assert "another max_bb (was 100, is 99), img_db; " in line
    assert [(begun / "scores.partial.npy").read_bytes(), (whole / "scores.npz").read_bytes()] == before

    shutil.copytree(few_texts, moved)
    inf_itm.main(options(txt_db=moved, batch_size=100))
    scores, expected = (np.load(folder / "scores.npz")["scores"] for folder in (begun, whole))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_finished_evaluation_is_printed_or_kept(
    tmp_path: Path, whole: Path, few_texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(whole, tmp_path / "out")
    options = inference(few_texts, BUNDLED.image_db, folder)
    monkeypatch.setattr(inf_itm, "score_matrix", None)  # nothing is scored again
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    inf_itm.main([*options, "--batch_size", "7"])
    printed = capsys.readouterr().out
    assert "counted as published" in printed
    inf_itm.main([*options, "--report"])
    assert capsys.readouterr().out == printed
    assert (folder / "report/index.html").exists()
    inf_itm.main([*options, "--report"])
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    (folder / "report/index.html").unlink()
    (folder / "report").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(inf_itm, "print", Mock(side_effect=SystemExit), raising=False)  # as "| true" does
        with pytest.raises(SystemExit):
            inf_itm.main([*options, "--report"])
    assert (folder / "report/index.html").exists()
    with monkeypatch.context() as patch:
        patch.setitem(REGULARISERS, "singular", Regulariser("singular", lambda pair: pair.scores.intra.mean(), alignment=True))
        assert "with another regulariser singular; choose" in fails(capsys, inf_itm.main, options)
        for wrong, message in ((lambda pair: pair.scores.intra, "returned torch.float32"), (lambda _: 1 / 0, "failed: Zero")):
            patch.setitem(REGULARISERS, "wrong", Regulariser("wrong", wrong, alignment=False))
            line = fails(capsys, inf_itm.main, inference(few_texts, BUNDLED.image_db, tmp_path / "new"))
            assert f"regulariser wrong in tests.evaluation.test_scoring {message}" in line
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.results.provenance", lambda: {"commit": "", "torch": "", "modified": [" M inf_itm.py"]})
        inf_itm.main(options)
        assert "uncommitted changes" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(os, "statvfs", Mock(return_value=Mock(f_flag=os.ST_RDONLY)))
        changed = folder.stat().st_mtime_ns
        inf_itm.main(options)
        assert (capsys.readouterr().out, folder.stat().st_mtime_ns) == (printed, changed)
        (tmp_path / "new").mkdir()
        line = fails(capsys, inf_itm.main, inference(few_texts, BUNDLED.image_db, tmp_path / "new"))
        assert "new: on a read-only file system, choose another folder" in line
    for name, damaged, reason in (
        ("scores.npz", before[folder / "scores.npz"][0][:-1], "scores.npz is damaged; remove this folder"),
        ("scores.npz", None, "scores.npz: no such file"),
        ("scores.json", b"{}", "does not say what it was made from"),
        ("scores.json", None, "report: already exists, but no scores.json"),
    ):
        (folder / name).unlink(missing_ok=True) if damaged is None else (folder / name).write_bytes(damaged)
        assert reason in fails(capsys, inf_itm.main, options)


def test_damaged_partial_matrix_is_refused(begun: Path, few_texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = begun / "scores.partial.npy"
    for damaged in (matrix.read_bytes()[:5000], b"no array", None):
        matrix.unlink() if damaged is None else matrix.write_bytes(damaged)
        message = fails(capsys, inf_itm.main, inference(few_texts, BUNDLED.image_db, begun))
        assert "scores.partial.npy: cannot be read" in message
        assert "remove scores.partial.* to start over" in message
    np.save(matrix, np.zeros(3, np.float32))
    assert "not a float32 matrix" in fails(capsys, inf_itm.main, inference(few_texts, BUNDLED.image_db, begun))


def test_alignment_of_positives_is_the_mean_over_pairs(
    compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, model = first_texts(BUNDLED.source(), 4), BUNDLED.model()
    monkeypatch.setattr("evaluation.alignment.PAIRS_PER_BLOCK", 3)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = {name: {"L": 0.0, "V": 0.0} for name in naive.ALIGNMENTS}
    for text_id in split.text_db.ids:
        text = split.text_db[text_id]
        image = split.image_db[text.image]
        tokens = [split.text_db.cls_id, *text.input_ids.tolist(), split.text_db.sep_id]
        _, maps = naive.forward(weights, naive.Pair(tokens, image.features, image.boxes), 4, BUNDLED.config.num_hidden_layers)
        for name, by_modality in expected.items():
            for modality in by_modality:
                by_modality[modality] += naive.alignment(name, maps[-1], len(tokens), modality) / 4
    measured = alignment_of_positives(model, split, compute, loader, SingleProcess())
    for name, by_modality in expected.items():
        assert measured[name] == pytest.approx(by_modality, rel=1e-3, abs=1e-7)
    calls = iter([1.0, math.nan, *[1.0] * 6])
    monkeypatch.setitem(REGULARISERS, "odd", Regulariser("odd", lambda _: torch.tensor(next(calls)), alignment=False))
    second = split.text_db[split.text_db.ids[1]]
    with pytest.raises(InputError, match=f"loss odd of text '{second.id}' and image '{second.image}' is not finite"):
        alignment_of_positives(model, split, compute, loader, SingleProcess())


def test_the_checkpoint_that_was_read_is_recorded(tmp_path: Path, few_texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another one takes its place while it is scored."""
    checkpoint = shutil.copy(BUNDLED.folder / "model.pt", tmp_path)
    expected, score = sha256(checkpoint), inf_itm.score_matrix

    def replace_and_score(*arguments: Any, **named: Any) -> Any:
        Path(checkpoint).write_bytes(b"another")
        return score(*arguments, **named)

    monkeypatch.setattr(inf_itm, "score_matrix", replace_and_score)
    inf_itm.main(inference(few_texts, BUNDLED.image_db, tmp_path / "out", checkpoint=checkpoint))
    made = json.loads((tmp_path / "out/scores.json").read_text())["provenance"]
    assert made["checkpoint_sha256"] == made["origin"]["checkpoint"] == expected

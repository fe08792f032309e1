"""The two programs as a user runs them: a tiny training and evaluation, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lmdb
import numpy as np
import pytest
import torch

import inf_itm
import train_itm_hard_negatives
from data.boxes import BoxRule
from data.image_db import ImageDatabase, ImageDatabaseWriter
from data.text_db import TextDatabase, TextDatabaseWriter
from model.checkpoint import save_checkpoint
from model.iais import REGULARISERS, Regulariser
from model.retrieval import RetrievalModel
from tests.conftest import BUNDLED, GOLDEN, Golden, relative_error
from tests.processes import ENVIRONMENT, ROOT, Forked, finish
from tests.test_layout import PROGRAMS
from utils.errors import InputError

DATABASES = BUNDLED.text_db, BUNDLED.image_db
CHECKPOINT = BUNDLED.folder / "model.pt"
STATE: dict[str, torch.Tensor] = torch.load(CHECKPOINT, weights_only=True)
POSITIONS = "uniter.embeddings.position_embeddings.weight"


def _words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def inference(text_db: Path, image_db: Path, output: Path, golden: Golden = BUNDLED, **changes: object) -> list[str]:
    """The options of an evaluation."""
    options: dict[str, object] = {
        "txt_db": text_db, "img_db": image_db, "checkpoint": golden.folder / "model.pt",
        "model_config": golden.folder / "model.json", "output_dir": output, "n_workers": 0, "device": "cpu",
    }  # fmt: skip
    return _words(options | changes)


def training(text_db: Path, image_db: Path, output: Path, *extra: str, **changes: object) -> list[str]:
    """The options of a training of three updates."""
    options: dict[str, object] = {
        "train_txt_dbs": text_db, "train_img_dbs": image_db, "val_txt_db": text_db, "val_img_db": image_db,
        "model_config": BUNDLED.folder / "model.json", "checkpoint": CHECKPOINT, "output_dir": output,
        "negative_size": 7, "hard_neg_size": 3, "train_batch_size": 2, "num_train_steps": 3,
        "warmup_steps": 1, "valid_steps": 2, "n_workers": 0, "device": "cpu", "inf_minibatch_size": 64, "seed": 5,
    }  # fmt: skip
    return [*_words(options | changes), *extra]


def train(output: Path, *extra: str, **changes: object) -> None:
    """Train on the golden databases."""
    train_itm_hard_negatives.main(training(*DATABASES, output, *extra, **changes))


def fails(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """The line with which the program ends, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("changes", [{}, {"batch_size": 7, "n_workers": 2}], ids=str)
def test_evaluation_of_the_golden_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int]) -> None:
    inf_itm.main(inference(GOLDEN.text_db, GOLDEN.image_db, tmp_path / "out", golden=GOLDEN, **changes))
    with np.load(tmp_path / "out/scores.npz", allow_pickle=False) as arrays:
        assert arrays["scores"].dtype == np.float32
        rows = [arrays["txt_ids"].tolist().index(name) for name in GOLDEN.arrays["eval/txt_ids"].tolist()]
        columns = [arrays["img_ids"].tolist().index(name) for name in GOLDEN.arrays["eval/img_ids"].tolist()]
        assert relative_error(arrays["scores"][np.ix_(rows, columns)], GOLDEN.arrays["eval/scores"]) < 1e-4
    result = json.loads((tmp_path / "out/scores.json").read_text())
    assert result["as_published"] == pytest.approx(GOLDEN.recall["eval"])
    assert result["txt_r10"] == pytest.approx(GOLDEN.recall["eval"]["txt_r10"])
    assert result["counts"] == {"texts": len(rows), "images": len(columns), "pairs": len(rows) * len(columns)}
    assert result["provenance"]["ranking_head"] == "rank_output"
    assert f"{100 * result['r_mean']:.2f}" in capsys.readouterr().out


def test_training_then_evaluation(tmp_path: Path, few_texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in its own process; the evaluation takes its settings from the training."""
    run = tmp_path / "run"
    databases = few_texts, BUNDLED.image_db
    options = training(*databases, run, "--IAIS", "singular", test_txt_db=databases[0], test_img_db=databases[1], n_workers=1)
    finish(Forked("train_itm_hard_negatives", *options), 120, code=0)
    results = json.loads((run / "log/results.json").read_text())
    assert {"best_update", "validation", "test"} == set(results)
    assert json.loads((run / "log/hps.json").read_text())["IAIS"] == "singular"
    assert json.loads((run / "log/model.json").read_text())["hidden_dropout_prob"] == 0.1
    assert (run / "log/log.txt").read_text().count(" updates, validation") == 2
    assert list((run / "log").glob("events.out.tfevents*"))
    assert not list(run.rglob("*.partial"))

    options = inference(*databases, tmp_path / "out", checkpoint=run / "ckpt/model_best.pt")
    where = options.index("--model_config")
    options[where : where + 2] = ["--train_config", str(run / "log/hps.json")]
    finish(Forked("inf_itm", *options), 120, code=0)
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert {key: scores[key] for key in results["test"]} == pytest.approx(results["test"])

    odd, message = tmp_path / "odd.db", "CLS is 7, in {} it is 101; expected the same vocabulary"
    shutil.copytree(few_texts, odd)
    (odd / "meta.json").write_text((odd / "meta.json").read_text().replace('"CLS": 101', '"CLS": 7'))
    for known in ({"checkpoint": run / "ckpt/model_best.pt"}, {"train_config": run / "log/hps.json"}):
        options = inference(odd, BUNDLED.image_db, tmp_path / "odd", **known)
        assert message.format(run / "log/vocabulary.json") in fails(capsys, inf_itm.main, options)
    for name in ("val_txt_db", "test_txt_db"):
        options = training(
            *databases, tmp_path / "odd", **{"test_img_db": BUNDLED.image_db, "test_txt_db": few_texts, name: odd}
        )
        assert message.format(few_texts) in fails(capsys, train_itm_hard_negatives.main, options)


def test_same_seed_same_weights(tmp_path: Path, few_texts: Path) -> None:
    """With IAIS and dropout, to the bit, wherever images and activations come from."""
    weights = []
    for name, flags, changes in (
        ("a", [], {}),
        ("b", ["--checkpointing"], {"n_workers": 2, "image_cache": 0}),
        ("c", [], {"seed": 6}),
    ):
        train(tmp_path / name, "--IAIS", "singular", *flags, **{"val_txt_db": few_texts, **changes})
        weights.append(torch.load(tmp_path / name / "ckpt/model_last.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["rank_output.weight"], weights[2]["rank_output.weight"])


def test_the_best_checkpoint_in_validation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.1, 0.3, 0.2])
    weights: list[torch.Tensor] = []

    def scripted(model: RetrievalModel, *_: object) -> dict[str, float]:
        weights.append(model.rank_output.weight.detach().clone())
        return {"r_mean": next(measured)}

    monkeypatch.setattr(train_itm_hard_negatives, "validation_recalls", scripted)
    train(tmp_path / "run", valid_steps=1)
    results = json.loads((tmp_path / "run/log/results.json").read_text())
    assert results == {"best_update": 2, "validation": {"r_mean": 0.3}}
    for name, expected in (("best", weights[1]), ("last", weights[2])):
        saved = torch.load(tmp_path / f"run/ckpt/model_{name}.pt", weights_only=True)
        assert torch.equal(saved["rank_output.weight"], expected)


def test_the_log_has_the_error_of_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = training(*DATABASES, tmp_path / "run", learning_rate=1e30)
    for output in (fails(capsys, train_itm_hard_negatives.main, options), (tmp_path / "run/log/log.txt").read_text()):
        assert "(peak 1e+30): the score of text '" in output


def test_quick_validation_and_random_mining_without_long_texts(tmp_path: Path) -> None:
    train(tmp_path / "run", "--no-full_val", mining="random", inf_minibatch_size=10, max_txt_len=15)
    validation = json.loads((tmp_path / "run/log/results.json").read_text())["validation"]
    assert set(validation) == {"img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean"}
    assert validation["img_r10"] == 1  # each text's image is among 10
    assert 0 < validation["img_r1"] < 1
    kept = int((TextDatabase(BUNDLED.text_db).lengths <= 15).sum())
    assert f" {kept} training texts" in (tmp_path / "run/log/log.txt").read_text()


Score = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def score(few_texts: Path) -> Score:
    """Evaluate a few texts into a folder and return the scores."""

    def score(output: Path, *flags: str, image_db: Path = BUNDLED.image_db, **changes: object) -> np.ndarray:
        inf_itm.main([*inference(few_texts, image_db, output, **changes), *flags])
        return np.asarray(np.load(output / "scores.npz")["scores"])

    return score


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, score: Score) -> np.ndarray:
    return score(tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("form", ["compressed", "all", "all compressed", "fixed"])
def test_other_forms_of_the_image_database(tmp_path: Path, score: Score, expected: np.ndarray, form: str) -> None:
    """The same regions give the same scores, however they are stored."""
    stored = ImageDatabase(BUNDLED.image_db)
    compressed, keep_all = "compressed" in form, "all" in form
    rng = np.random.default_rng(0)
    fixed: dict[str, Any] = {"conf_th": -1, "num_bb": 12} if form == "fixed" else {}
    with ImageDatabaseWriter(tmp_path / "db", None if keep_all else BoxRule(**fixed), compressed=compressed) as writer:
        for name in stored.names():
            image, dropped = stored[name], 5 if keep_all else 0
            conf = np.repeat([0.9, 0.1], [len(image.boxes), dropped])
            arrays = [
                np.concatenate([one, rng.random((dropped, one.shape[1]))]) for one in (image.features, image.boxes[:, :6])
            ]
            writer.put(name, *(array.astype(np.float16) for array in (*arrays, conf)))
    stored.close()
    scores = score(tmp_path / "out", *(["--compressed_db"] if compressed else []), image_db=tmp_path / "db", **fixed)
    assert np.isfinite(scores).all()
    assert np.array_equal(scores, expected) == (form != "fixed")


def test_names_of_2018_and_pretrained_checkpoints(tmp_path: Path, score: Score, expected: np.ndarray) -> None:
    """LayerNorm's former names mean the same; without a ranking head, it is row 1 of the pretrained head."""
    states = {
        "2018": {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in STATE.items()},
        "copied": STATE | {f"rank_output.{part}": STATE[f"itm_output.{part}"][1:2].clone() for part in ("weight", "bias")},
        "pretrained": {n: t for n, t in STATE.items() if "rank_output" not in n},
    }
    scores = {}
    for name, state in states.items():
        torch.save(state, tmp_path / "model.pt")
        scores[name] = score(tmp_path / name, checkpoint=tmp_path / "model.pt")
    assert np.array_equal(scores["2018"], expected)
    assert np.array_equal(scores["copied"], scores["pretrained"])
    result = json.loads((tmp_path / "pretrained/scores.json").read_text())
    assert result["provenance"]["ranking_head"] == "itm_output"


@pytest.mark.parametrize(
    ("message", "change", "architecture"),
    [
        ("no such file, expected a checkpoint", None, {}),
        ("not a readable checkpoint", b"no checkpoint", {}),
        ("not a readable checkpoint", CHECKPOINT.read_bytes()[:100_000], {}),
        ("state dict", torch.zeros(1), {}),
        ("a training state, for --resume; expected weights, such as", {"model": {}, "optimiser": {}}, {}),
        ("state dict", {"model": {"a": torch.zeros(1)}}, {}),
        ("uniter.pooler.dense.bias is missing", {"uniter.pooler.dense.bias": None}, {}),
        ("neither rank_output nor itm_output", dict.fromkeys(n for n in STATE if "_output" in n), {}),
        ("rank_output has only a weight", {"rank_output.bias": None}, {}),
        ("itm_output.bias has shape ()", {n: None for n in STATE if "rank_" in n} | {"itm_output.bias": torch.tensor(0.0)}, {}),
        ("layer.3.output.dense.bias", {"uniter.encoder.layer.3.output.dense.bias": torch.zeros(32)}, {}),
        ("has type torch.int64", {"uniter.pooler.dense.bias": torch.zeros(32, dtype=torch.int64)}, {}),
        ("not a readable checkpoint", {"uniter.pooler.dense.bias": torch.zeros(32).to_sparse()}, {}),
        ("LayerNorm.weight twice", {"uniter.embeddings.LayerNorm.gamma": torch.ones(32)}, {}),
        ("intermediate.dense.weight has shape", {}, {"intermediate_size": 128}),
        ("another vocabulary", {}, {"vocab_size": 30522}),
        (f"{POSITIONS} has shape", {}, {"max_position_embeddings": 12}),
        ("word pieces, expected at most 10", {POSITIONS: STATE[POSITIONS][:12].clone()}, {"max_position_embeddings": 12}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoints_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, change: Any, architecture: dict[str, int]
) -> None:
    checkpoint, config = tmp_path / "odd.pt", tmp_path / "odd.json"
    config.write_text(json.dumps(json.loads((BUNDLED.folder / "model.json").read_text()) | architecture))
    if isinstance(change, bytes):
        checkpoint.write_bytes(change)
    elif isinstance(change, dict):
        torch.save({name: tensor for name, tensor in (STATE | change).items() if tensor is not None}, checkpoint)
    elif change is not None:
        torch.save(change, checkpoint)
    options = inference(*DATABASES, tmp_path / "out", checkpoint=checkpoint, model_config=config)
    line = fails(capsys, inf_itm.main, options)
    assert message in line
    assert "word pieces" in message or str(checkpoint) in line
    assert not (tmp_path / "out").exists()


def test_mistakes_with_databases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_db, image_db = tmp_path / BUNDLED.text_db.name, tmp_path / BUNDLED.image_db.name
    shutil.copytree(BUNDLED.text_db, text_db)
    shutil.copytree(BUNDLED.image_db, image_db)
    with TextDatabaseWriter(tmp_path / "other.db", json.loads((text_db / "meta.json").read_text())) as writer:
        writer.put("x", [200], "nowhere.npz")

    def refused(message: object, text: Path = text_db, image: Path = image_db) -> None:
        assert str(message) in fails(capsys, inf_itm.main, inference(text, image, tmp_path / "out"))

    refused(tmp_path / "none", text=tmp_path / "none")
    refused(tmp_path / "none", image=tmp_path / "none")
    refused("image 'nowhere.npz'", text=tmp_path / "other.db")
    sidecars = [next(image_db.glob("nbb*.json")), *text_db.glob("*.json")]
    assert len(sidecars) == 5
    for sidecar in sidecars:
        moved = sidecar.rename(tmp_path / "moved.json")
        refused(sidecar.name)
        moved.rename(sidecar)
    for file in (text_db / "data.mdb", next(image_db.glob("feat_*/data.mdb"))):
        whole = file.read_bytes()
        with lmdb.open(str(file.parent), lock=False) as environment, environment.begin(write=True) as transaction:
            for key in list(transaction.cursor().iternext(values=False)):
                transaction.put(key, transaction.get(key) if key.startswith(b"__") else b"no record")
        refused(f"{file.parent}: ")
        file.write_bytes(whole[: len(whole) // 2])
        refused("truncated")
        file.write_bytes(whole)
    (text_db / "id2len.json").write_text("{}")
    refused("empty split")
    assert not (tmp_path / "out").exists()


def test_mistakes_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def refused(message: str, **changes: object) -> None:
        assert message in fails(capsys, train_itm_hard_negatives.main, training(*DATABASES, run, **changes))

    refused("expected more than negative_size 200", negative_size=200)
    refused("iais_layers names layer 9, expected -3 to 2", IAIS="singular", iais_layers=9)
    refused("did you mean", lerning_rate=1)
    refused("device 'cuda:77' cannot be used", device="cuda:77")
    refused("fp16 needs a CUDA device", precision="fp16")
    for wrong, returned in (
        (lambda intra: intra, "torch.float32[4, 12, 12], requires_grad True"),
        (lambda intra: intra.argmax(), "torch.int64[]"),
        (lambda intra: intra.detach().mean(), "torch.float32[], requires_grad False"),
        (lambda intra: intra.mean().item(), "0.0; expected a floating-point tensor of shape [], requires_grad True"),
    ):
        loss = Regulariser("wrong", lambda pair, wrong=wrong: wrong(pair.scores.intra), alignment=False)
        monkeypatch.setitem(REGULARISERS, "wrong", loss)
        refused(f"regulariser wrong in tests.test_programs returned {returned}", IAIS="wrong")
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    refused("holds notes.txt")
    assert (run / "notes.txt").read_text() == "mine"


def has_learned(run: Path) -> bool:
    """Whether the run's last weights are finite, and not those that it started from."""
    weights = torch.load(run / "ckpt/model_last.pt", weights_only=True)
    moved = any(not torch.equal(STATE[name], tensor) for name, tensor in weights.items())
    return moved and all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(tmp_path: Path, precision: str) -> None:
    train(tmp_path / "run", device="cuda", precision=precision)
    assert has_learned(tmp_path / "run")


def test_bf16_on_the_cpu(tmp_path: Path, few_texts: Path, score: Score, expected: np.ndarray) -> None:
    assert 0 < relative_error(score(tmp_path / "out", precision="bf16"), expected) < 0.05
    train(tmp_path / "run", "--IAIS", "distributed", val_txt_db=few_texts, precision="bf16")
    assert has_learned(tmp_path / "run")


def test_outputs_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below", tmp_path / "no\0name"):
        for main, options in ((inf_itm.main, inference), (train_itm_hard_negatives.main, training)):
            assert f"output_dir {str(output)!r}" in fails(capsys, main, options(*DATABASES, output))


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model.pt", STATE)
    before = (tmp_path / "model.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(InputError, match=r"model\.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "model.pt", STATE)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def redirected(streams: str, *words: str | Path) -> tuple[int, str]:
    """The exit code and the errors of a program started with its streams redirected by a shell."""
    command = ["bash", "-c", f'"$@" {streams}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", ["scripts.make_scenes", *(pytest.param(name, marks=pytest.mark.long) for name in PROGRAMS)])
def test_help_without_streams(program: str) -> None:
    """Of every program: the right exit code, at most one line, and never Python's own 120."""
    nothing = {"<&-": 0, ">&-": 0, "2>&-": 0, "<&- >&- 2>&-": 0, "2>/dev/full": 0, ">/dev/full": 2, "2>&1 | true": 141}
    for streams, code in nothing.items():
        found, errors = redirected(streams, program.replace(".", "/") + ".py", "--help")
        assert (found, errors.count("\n")) == (code, code == 2), streams
        assert errors.startswith("error: standard output: cannot be written (No space left" if code == 2 else "")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"])
def test_work_without_streams(tmp_path: Path, few_texts: Path, streams: str) -> None:
    """Processes that the programs start do without them, too, and no file is taken for one of them."""
    run, databases = tmp_path / "run", (few_texts, BUNDLED.image_db)
    words = training(*databases, run, "--no-full_val", n_workers=1, inf_minibatch_size=8)
    assert redirected(streams, "train_itm_hard_negatives.py", *words) == (0, "")
    assert (run / "log/log.txt").read_text().count(" updates, validation") == 2
    assert len((run / "log/scalars.jsonl").read_text().splitlines()) == 5
    code, _ = redirected(streams, "scripts/inspect_db.py", *databases, "--nproc", "2", "--plot", tmp_path / "plot.png")
    assert code == (1 if "|" not in streams else 141)

"""The two programs as a user runs them: a tiny training and evaluation, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lz4.frame
import msgpack
import numpy as np
import pytest
import torch

import inf_itm
import train_itm_hard_negatives
from data.boxes import BoxRule
from data.image_db import ImageDatabase, ImageDatabaseWriter
from data.text_db import TextDatabase, TextDatabaseWriter
from model.checkpoint import save_checkpoint
from model.retrieval import RetrievalModel
from tests.conftest import BUNDLED, GOLDEN, Golden, relative_error
from utils.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def databases(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the golden databases, to be damaged."""
    text_db, image_db = tmp_path / BUNDLED.text_db.name, tmp_path / BUNDLED.image_db.name
    shutil.copytree(BUNDLED.text_db, text_db)
    shutil.copytree(BUNDLED.image_db, image_db)
    return text_db, image_db


def inference(text_db: Path, image_db: Path, output: Path, golden: Golden = BUNDLED, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "txt_db": text_db, "img_db": image_db, "checkpoint": golden.folder / "model.pt",
        "model_config": golden.folder / "model.json", "output_dir": output, "n_workers": 0, "device": "cpu",
    }  # fmt: skip
    return [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]


def training(text_db: Path, image_db: Path, output: Path, *extra: str, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "train_txt_dbs": text_db, "train_img_dbs": image_db, "val_txt_db": text_db, "val_img_db": image_db,
        "model_config": BUNDLED.folder / "model.json", "checkpoint": BUNDLED.folder / "model.pt", "output_dir": output,
        "negative_size": 7, "hard_neg_size": 3, "train_batch_size": 2, "num_train_steps": 3,
        "warmup_steps": 1, "valid_steps": 2, "n_workers": 0, "device": "cpu", "inf_minibatch_size": 64, "seed": 5,
    }  # fmt: skip
    return [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))] + list(extra)


def fails(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """The one line with which the program ends, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("changes", [{}, {"batch_size": 7}, {"n_workers": 2}], ids=str)
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


def test_training_then_evaluation(tmp_path: Path, few_texts: Path) -> None:
    """A run as on the command line, in processes of its own; the evaluation takes its settings from the training."""
    run = tmp_path / "run"
    databases = few_texts, BUNDLED.image_db
    command = training(*databases, run, "--IAIS", "singular", test_txt_db=databases[0], test_img_db=databases[1], n_workers=1)
    subprocess.run([sys.executable, "train_itm_hard_negatives.py", *command], cwd=ROOT, check=True, capture_output=True)
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
    subprocess.run([sys.executable, "inf_itm.py", *options], cwd=ROOT, check=True, capture_output=True)
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert {key: scores[key] for key in results["test"]} == pytest.approx(results["test"])


def test_same_seed_same_weights(tmp_path: Path, few_texts: Path) -> None:
    """Two runs with one seed end alike to the bit, with IAIS and dropout, wherever images and activations come from."""
    weights = []
    for name, flags, extra in (
        ("a", [], {}),
        ("b", ["--checkpointing"], {"n_workers": 2, "image_cache": 0}),
        ("c", [], {"seed": 6}),
    ):
        changes = {"val_txt_db": few_texts} | extra
        options = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / name, "--IAIS", "singular", *flags, **changes)
        train_itm_hard_negatives.main(options)
        weights.append(torch.load(tmp_path / name / "ckpt/model_last.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["rank_output.weight"], weights[2]["rank_output.weight"])


def test_the_best_checkpoint_in_validation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.1, 0.3, 0.2])
    states: list[torch.Tensor] = []

    def scripted(model: RetrievalModel, *_: object) -> dict[str, float]:
        states.append(model.rank_output.weight.detach().clone())
        return {"r_mean": next(measured)}

    monkeypatch.setattr(train_itm_hard_negatives, "validate", scripted)
    train_itm_hard_negatives.main(training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", valid_steps=1))
    results = json.loads((tmp_path / "run/log/results.json").read_text())
    assert results == {"best_update": 2, "validation": {"r_mean": 0.3}}
    for name, state in (("best", states[1]), ("last", states[2])):
        assert torch.equal(torch.load(tmp_path / f"run/ckpt/model_{name}.pt", weights_only=True)["rank_output.weight"], state)


def test_longer_texts_are_left_out_of_training(tmp_path: Path, few_texts: Path) -> None:
    options = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", max_txt_len=15, val_txt_db=few_texts)
    train_itm_hard_negatives.main(options)
    kept = int((TextDatabase(BUNDLED.text_db).lengths <= 15).sum())
    assert f"{kept} texts in training" in (tmp_path / "run/log/log.txt").read_text()


def test_a_run_that_fails_says_so_in_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", learning_rate=1e30)
    assert "(peak 1e+30): the score of text '" in fails(capsys, train_itm_hard_negatives.main, options)
    assert "(peak 1e+30): the score of text '" in (tmp_path / "run/log/log.txt").read_text()


def test_quick_validation_and_random_mining(tmp_path: Path) -> None:
    options = training(
        BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", "--no-full_val", mining="random", inf_minibatch_size=10
    )
    train_itm_hard_negatives.main(options)
    validation = json.loads((tmp_path / "run/log/results.json").read_text())["validation"]
    assert set(validation) == {"img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean"}
    assert validation["img_r10"] == 1  # each text's image is among 10
    assert 0 < validation["img_r1"] < 1


def test_pretrained_head_is_row_1_of_itm_output(tmp_path: Path, few_texts: Path) -> None:
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    for part in ("weight", "bias"):
        state[f"rank_output.{part}"] = state[f"itm_output.{part}"][1:2].clone()
    torch.save(state, tmp_path / "copied.pt")
    torch.save({name: tensor for name, tensor in state.items() if "rank_output" not in name}, tmp_path / "pretrained.pt")
    scores = []
    for name in ("copied", "pretrained"):
        inf_itm.main(inference(few_texts, BUNDLED.image_db, tmp_path / name, checkpoint=tmp_path / f"{name}.pt"))
        scores.append(np.load(tmp_path / name / "scores.npz")["scores"])
    assert np.array_equal(*scores)
    assert json.loads((tmp_path / "pretrained/scores.json").read_text())["provenance"]["ranking_head"] == "itm_output"


@pytest.mark.parametrize("form", ["compressed", "all", "all compressed", "fixed"])
def test_other_forms_of_the_image_database(tmp_path: Path, few_texts: Path, form: str) -> None:
    """The same regions, stored in each of the ways a user may have them, give the same scores."""
    stored = ImageDatabase(BUNDLED.image_db)
    compressed, keep_all = "compressed" in form, "all" in form
    rng = np.random.default_rng(0)
    fixed = {"conf_th": -1, "num_bb": 12} if form == "fixed" else {}
    with ImageDatabaseWriter(tmp_path / "db", None if keep_all else BoxRule(**fixed), compressed=compressed) as writer:  # type: ignore[arg-type]
        for name in stored.names():
            image = stored[name]
            conf = np.full(len(image.boxes), 0.9, np.float16)
            features, boxes = image.features, image.boxes[:, :6].astype(np.float16)
            if keep_all:  # boxes that the filter drops
                conf = np.concatenate([conf, np.full(5, 0.1, np.float16)])
                features = np.concatenate([features, rng.random((5, features.shape[1])).astype(np.float16)])
                boxes = np.concatenate([boxes, rng.random((5, 6)).astype(np.float16)])
            writer.put(name, features, boxes, conf)
    stored.close()
    flags = ["--compressed_db"] if compressed else []
    inf_itm.main(inference(few_texts, tmp_path / "db", tmp_path / "out", **fixed) + flags)
    scores = np.load(tmp_path / "out/scores.npz")["scores"]
    if form != "fixed":
        inf_itm.main(inference(few_texts, BUNDLED.image_db, tmp_path / "expected"))
        assert np.array_equal(scores, np.load(tmp_path / "expected/scores.npz")["scores"])
    assert np.isfinite(scores).all()


def test_checkpoint_of_2018_names(tmp_path: Path) -> None:
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    torch.save(old, tmp_path / "old.pt")
    inf_itm.main(inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "out", checkpoint=tmp_path / "old.pt"))
    result = json.loads((tmp_path / "out/scores.json").read_text())
    assert result["as_published"] == pytest.approx(BUNDLED.recall["eval"])


def without(tensor: str, path: Path) -> Path:
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if not name.startswith(tensor)}, path)
    return path


def architecture(path: Path, **changes: int) -> Path:
    path.write_text(json.dumps(json.loads((BUNDLED.folder / "model.json").read_text()) | changes))
    return path


def test_mistakes_with_checkpoint_and_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(**changes: object) -> str:
        return fails(capsys, inf_itm.main, inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "out", **changes))

    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "half.pt").write_bytes((BUNDLED.folder / "model.pt").read_bytes()[:100_000])
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    assert "missing.pt: no such checkpoint" in line(checkpoint=tmp_path / "missing.pt")
    for name in ("text", "half"):
        assert f"{name}.pt: not a readable checkpoint" in line(checkpoint=tmp_path / f"{name}.pt")
    assert "nested.pt: expected a state dict" in line(checkpoint=tmp_path / "nested.pt")
    pooler = without("uniter.pooler.dense.bias", tmp_path / "pooler.pt")
    assert "pooler.pt: uniter.pooler.dense.bias is missing, expected a tensor of shape" in line(checkpoint=pooler)
    headless = without("itm_output", without("rank_output", tmp_path / "headless.pt"))
    state = {n: t for n, t in torch.load(headless, weights_only=True).items() if "rank_output" not in n}
    torch.save(state, headless)
    assert "headless.pt: neither rank_output nor itm_output" in line(checkpoint=headless)
    wide = architecture(tmp_path / "wide.json", intermediate_size=128)
    assert "intermediate.dense.weight has shape" in line(model_config=wide)
    words = architecture(tmp_path / "words.json", vocab_size=30522)
    assert "another vocabulary" in line(model_config=words)
    short = architecture(tmp_path / "short.json", max_position_embeddings=12)
    assert "position_embeddings.weight has shape" in line(model_config=short)
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True)
    position_table = "uniter.embeddings.position_embeddings.weight"
    torch.save(state | {position_table: state[position_table][:12].clone()}, tmp_path / "short.pt")
    assert "word pieces, expected at most 10" in line(model_config=short, checkpoint=tmp_path / "short.pt")
    assert not (tmp_path / "out").exists()


def test_mistakes_with_databases(tmp_path: Path, databases: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text_db, image_db = databases
    output = tmp_path / "out"

    def line(text: Path = text_db, image: Path = image_db) -> str:
        return fails(capsys, inf_itm.main, inference(text, image, output))

    assert str(tmp_path / "none") in line(text=tmp_path / "none")
    assert str(tmp_path / "none") in line(image=tmp_path / "none")
    sidecar = next(image_db.glob("nbb*.json"))
    moved = sidecar.rename(tmp_path / "moved.json")
    assert sidecar.name in line()
    moved.rename(sidecar)
    for name in ("meta.json", "id2len.json", "txt2img.json", "img2txts.json"):
        moved = (text_db / name).rename(tmp_path / "moved.json")
        assert name in line()
        moved.rename(text_db / name)

    with TextDatabaseWriter(tmp_path / "other.db", {**json.loads((text_db / "meta.json").read_text())}) as writer:
        writer.put("x", [200], "nowhere.npz")
    assert "image 'nowhere.npz'" in line(text=tmp_path / "other.db")
    (text_db / "id2len.json").write_text("{}")
    assert "empty split" in line()
    assert not output.exists()


def test_damaged_databases(tmp_path: Path, databases: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text_db, image_db = databases
    lmdb_folder = next(image_db.glob("feat_*"))
    whole = (lmdb_folder / "data.mdb").read_bytes()
    (lmdb_folder / "data.mdb").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in fails(capsys, inf_itm.main, inference(text_db, image_db, tmp_path / "out"))

    names = TextDatabase(text_db).images
    (lmdb_folder / "data.mdb").unlink()
    rewrite(lmdb_folder, dict.fromkeys(names, b"no msgpack"))
    assert "heldout" in fails(capsys, inf_itm.main, inference(text_db, image_db, tmp_path / "out"))
    pickled = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": (1,), b"data": b"cos\nsystem\n(S'false'\ntR."}
    rewrite(lmdb_folder, {name: msgpack.packb({b"features": pickled, b"norm_bb": pickled}) for name in names})
    assert "pickle" in fails(capsys, inf_itm.main, inference(text_db, image_db, tmp_path / "out"))
    rewrite(text_db, {str(number): lz4.frame.compress(b"\xc1") for number in range(200)})
    shutil.copytree(BUNDLED.image_db, image_db, dirs_exist_ok=True)
    assert str(text_db) in fails(capsys, inf_itm.main, inference(text_db, image_db, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def rewrite(folder: Path, records: dict[str, bytes]) -> None:
    import lmdb

    for name in ("data.mdb", "lock.mdb"):
        (folder / name).unlink(missing_ok=True)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)


def test_mistakes_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    databases = BUNDLED.text_db, BUNDLED.image_db

    def line(*extra: str, **changes: object) -> str:
        return fails(capsys, train_itm_hard_negatives.main, training(*databases, tmp_path / "run", *extra, **changes))

    assert "expected more than negative_size 200" in line(negative_size=200)
    assert "iais_layers names layer 9, expected -3 to 2" in line("--IAIS", "singular", "--iais_layers", "9")
    assert "did you mean" in line("--lerning_rate", "1")
    assert "device 'cuda:77' cannot be used" in line(device="cuda:77")
    assert "fp16 needs a CUDA device" in line(precision="fp16")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert "not empty (it holds notes.txt)" in line()
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def has_learned(run: Path) -> bool:
    """Whether the run's last weights are finite, and not those that it started from."""
    before, after = (torch.load(path, weights_only=True) for path in (BUNDLED.folder / "model.pt", run / "ckpt/model_last.pt"))
    moved = any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    return moved and all(bool(tensor.isfinite().all()) for tensor in after.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(tmp_path: Path, precision: str) -> None:
    options = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", device="cuda", precision=precision)
    train_itm_hard_negatives.main(options)
    assert has_learned(tmp_path / "run")


def test_bf16_on_the_cpu_keeps_the_scores_near(tmp_path: Path, few_texts: Path) -> None:
    for precision in ("fp32", "bf16"):
        inf_itm.main(inference(few_texts, BUNDLED.image_db, tmp_path / precision, precision=precision))
    full, half = (np.load(tmp_path / name / "scores.npz")["scores"] for name in ("fp32", "bf16"))
    assert 0 < relative_error(half, full) < 0.05
    changes = {"val_txt_db": few_texts, "precision": "bf16"}
    train_itm_hard_negatives.main(
        training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", "--IAIS", "distributed", **changes)
    )
    assert has_learned(tmp_path / "run")


class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"rank_output.weight": Canary(tmp_path / "sung")}, tmp_path / "canary.pt")
    options = inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "out", checkpoint=tmp_path / "canary.pt")
    assert "canary.pt: not a readable checkpoint" in fails(capsys, inf_itm.main, options)
    assert not (tmp_path / "sung").exists()


def test_outputs_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    databases = BUNDLED.text_db, BUNDLED.image_db
    for output in (tmp_path / "file", tmp_path / "file/below", tmp_path / "no\0name"):
        expected = f"output_dir {str(output)!r}: cannot be made"
        assert expected in fails(capsys, inf_itm.main, inference(*databases, output))
        assert expected in fails(capsys, train_itm_hard_negatives.main, training(*databases, output))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_output.bias": None}, "rank_output has a weight alone"),
        (
            {"rank_output.weight": None, "rank_output.bias": None, "itm_output.bias": torch.tensor(0.0)},
            "itm_output.bias has shape ()",
        ),
        ({"uniter.encoder.layer.3.output.dense.bias": torch.zeros(32)}, "model_config has only 3 such layers"),
        ({"uniter.pooler.dense.bias": torch.zeros(32, dtype=torch.int64)}, "has type torch.int64"),
        ({"uniter.pooler.dense.bias": torch.zeros(32).to_sparse()}, "expected plain numbers"),
        ({"uniter.embeddings.LayerNorm.gamma": torch.ones(32)}, "holds uniter.embeddings.LayerNorm.weight twice"),
    ],
    ids=str,
)
def test_checkpoints_that_mean_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = torch.load(BUNDLED.folder / "model.pt", weights_only=True) | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "odd.pt")
    options = inference(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "out", checkpoint=tmp_path / "odd.pt")
    assert message in fails(capsys, inf_itm.main, options)


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BUNDLED.model()
    save_checkpoint(tmp_path / "model.pt", model.state_dict())
    before = (tmp_path / "model.pt").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"model\.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "model.pt", model.state_dict())
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    options = training(BUNDLED.text_db, BUNDLED.image_db, tmp_path / "run", num_train_steps=10000, valid_steps=10000)
    command = [sys.executable, "train_itm_hard_negatives.py", *options]

    def heed_interrupts() -> None:  # which a shell's background jobs ignore, and their children with them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        while not (tmp_path / "run/log/log.txt").exists() or "in training" not in (tmp_path / "run/log/log.txt").read_text():
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors

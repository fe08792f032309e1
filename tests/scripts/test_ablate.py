"""Ablations: the grid expanded, interrupted and resumed, and statistics against tables and by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation.ablation.execution import ProgramFailed, Programs, reason_of, result_files, run_all
from evaluation.ablation.grid import RESULT_NEUTRAL, Grid, Run, planned
from evaluation.ablation.table import as_markdown, estimate, rows_of
from evaluation.plots.curves import ablation_figure
from examples.scenes import demo
from optim.options import TrainOptions
from scripts import ablate
from tests.conftest import BUNDLED
from tests.test_programs import fails
from utils.errors import InputError
from utils.options import read_json_as

ROOT = Path(__file__).parent.parent.parent
DATABASES = {"text": str(BUNDLED.text_db), "image": str(BUNDLED.image_db)}
TRAINING = {
    "train_txt_dbs": [DATABASES["text"]], "train_img_dbs": [DATABASES["image"]], "val_txt_db": DATABASES["text"],
    "val_img_db": DATABASES["image"], "model_config": str(BUNDLED.folder / "model.json"), "n_workers": 0, "device": "cpu",
    "checkpoint": str(BUNDLED.folder / "model.pt"), "negative_size": 7, "hard_neg_size": 3, "train_batch_size": 2,
    "num_train_steps": 8, "warmup_steps": 1, "valid_steps": 8, "save_steps": 1, "full_val": False, "inf_minibatch_size": 8,
}  # fmt: skip


def written(folder: Path, **changes: object) -> Path:
    """Write a grid to ``folder``, beside the training that it is about."""
    config = folder / "training.json"
    config.write_text(json.dumps(TRAINING))
    values = {
        "config": str(config), "grid": [{"IAIS": [None, "cacr"]}], "seeds": [1],
        "test_txt_db": DATABASES["text"], "test_img_db": DATABASES["image"],
    }  # fmt: skip
    path = folder / "grid.json"
    path.write_text(json.dumps(values | changes))
    return path


def plan(folder: Path, **changes: object) -> list[Run]:
    path = written(folder, **changes)
    return planned(read_json_as(Grid, path), path, folder / "out", TrainOptions)


def test_products_are_expanded_for_each_seed(tmp_path: Path) -> None:
    grid = [{"IAIS": [None]}, {"IAIS": ["singular", "cacr"], "iais_layers": [[-1], [0, 1]], "iais_weight": [2.0]}]
    runs = plan(tmp_path, grid=grid, seeds=[3, 5], options={"margin": 0.3})
    products = [(kind, layers) for kind in ("singular", "cacr") for layers in ("-1", "0+1")]
    names = ["IAIS=none", *(f"IAIS={kind}, iais_layers={layers}, iais_weight=2.0" for kind, layers in products)]
    assert [(run.seed, run.name) for run in runs] == [(seed, name) for seed in (3, 5) for name in names]
    last = runs[-1].options
    assert (last.IAIS, last.iais_layers, last.iais_weight, last.margin, last.seed) == ("cacr", (0, 1), 2.0, 0.3, 5)
    assert len({run.folder for run in runs}) == len(runs)


def test_another_result_has_another_folder(tmp_path: Path) -> None:
    """What a run starts from matters, too; how fast it is does not."""
    start = tmp_path / "start.json"

    def folders(margin: float = 0.2, **changes: object) -> list[Path]:
        start.write_text(json.dumps({**TRAINING, "checkpoint": None, "margin": margin}))
        return [run.folder for run in plan(tmp_path, start=str(start), **changes)]

    before = folders()
    assert [folder.name.split("-")[0] for folder in before] == ["start", "IAIS=none", "IAIS=cacr"]
    assert plan(tmp_path, start=str(start))[1].options.checkpoint == str(before[0] / "ckpt/model_best.pt")
    assert folders(options={"n_workers": 2, "save_steps": 3}) == before
    for others in (folders(margin=0.4), folders(options={"learning_rate": 1e-3}), folders(options={"precision": "bf16"})):
        assert not set(others) & set(before)
    for name in RESULT_NEUTRAL:  # of an ablation is less than what may change when a training is resumed
        assert not TrainOptions.__dataclass_fields__[name].metadata["affects_result"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "grid.json: unknown key 'sedes' (did you mean 'seeds'?)"),
        ({"seeds": [1, 1]}, "seeds is [1, 1], expected distinct seeds"),
        ({"seeds": []}, "seeds is missing"),
        ({"grid": [{"IAIS": []}]}, 'grid has {"IAIS": []}, expected options with a list of values each'),
        ({"grid": [{"IAIS": [None]}, {"IAIS": ["cacr", None]}]}, "grid has IAIS=none twice"),
        ({"grid": [{"iais_wait": [1.0]}]}, "unknown key 'iais_wait' (did you mean 'iais_weight'?)"),
        ({"grid": [{"margin": [-1.0]}]}, "margin=-1.0 with"),
        ({"grid": [{"seed": [1]}]}, "seed is given among options or in grid"),
        ({"options": {"output_dir": "x"}}, "output_dir is given among options or in grid"),
        ({"test_txt_db": "nowhere"}, "test_txt_db nowhere: no such file or folder"),
        ({"winoground_img_db": "x"}, "winoground_examples and winoground_img_db: only one is given"),
    ],
    ids=str,
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str) -> None:
    line = fails(capsys, ablate.main, [str(written(tmp_path, **changes)), "--output", str(tmp_path / "out")])
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_failing_start_stops_its_own_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, start=str(tmp_path / "training.json"), seeds=[1, 2])
    grid = read_json_as(Grid, path)
    done: list[str] = []

    def run(self: Programs, program: str, arguments: Sequence[str], log: Path) -> None:
        options = json.loads(Path(arguments[1]).read_text()) if program.startswith("train") else {}
        if options.get("seed") == 1 and not options["IAIS"]:
            raise ProgramFailed("no disk")
        done.append(log.name)
        if options:
            (Path(options["output_dir"]) / "log").mkdir(parents=True)
            (Path(options["output_dir"]) / "log/results.json").touch()

    monkeypatch.setattr(Programs, "run", run)
    errors = {str(run): error for run, error in run_all(planned(grid, path, tmp_path, TrainOptions), grid, tmp_path, jobs=3)}
    assert errors == {
        "seed 1, start": "no disk", "seed 1, IAIS=none": "its start failed", "seed 1, IAIS=cacr": "its start failed",
        "seed 2, start": None, "seed 2, IAIS=none": None, "seed 2, IAIS=cacr": None,
    }  # fmt: skip
    assert "start" in done[0]
    assert len(done) == 6  # a training and an evaluation each


def test_no_program_survives_a_stop(tmp_path: Path) -> None:
    programs = Programs()
    programs.stop()
    with pytest.raises(ProgramFailed, match=r"inspect_db\.py: killed by SIGTERM"):
        programs.run("scripts/inspect_db.py", ["--help"], tmp_path / "log.txt")
    bar = "scoring:  50%|█████     | 4/8 [00:01<00:01,  3.9pair/s]\r"
    for printed, reason in (
        (f"error: no disk\n{bar}\n", "no disk"),
        (bar, "exit code 1"),
        (f"{bar}KeyError: 1\n", "KeyError: 1"),
    ):
        assert reason_of(1, printed) == reason


def test_interrupted_then_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs themselves: stopped in training, resumed in a larger grid; one run fails, the others do not."""
    plain_run, aligned_run, failing = {"IAIS": [None]}, {"IAIS": ["cacr"], "iais_weight": [2.0]}, {"iais_layers": [[9]]}
    path, output = written(tmp_path, grid=[aligned_run]), tmp_path / "out"
    command = [sys.executable, "scripts/ablate.py", str(path), "--output", str(output), "--jobs", "2"]
    ablation = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(output.glob("seed-1/*/ckpt/state-*.pt")):
        assert ablation.poll() is None
        time.sleep(0.02)
    ablation.send_signal(signal.SIGTERM)
    assert "interrupted by SIGTERM" in ablation.communicate()[1]
    assert ablation.returncode == 128 + signal.SIGTERM
    log = next(output.glob("logs/*.txt"))
    assert "interrupted by SIGTERM" in log.read_text()  # the training has ended as well

    written(tmp_path, grid=[plain_run, aligned_run, {"IAIS": ["cacr"], **failing}])
    with pytest.raises(SystemExit) as caught:
        ablate.main(command[2:])
    assert caught.value.code == 1
    text = (output / "ablation.md").read_text()
    assert text in capsys.readouterr().out
    assert "Runs: 2 of 3." in text
    assert "- seed 1, IAIS=cacr, iais_layers=9: train_itm_hard_negatives.py: iais_layers names layer 9" in text
    assert "INFO resuming from" in log.read_text()
    written_down = json.loads((output / "ablation.json").read_text())
    plain, aligned, failed = written_down["runs"]
    for run in (plain, aligned):
        scores = json.loads(next(Path(run["output_dir"]).glob("test-best-*/scores.json")).read_text())
        assert run["values"]["img_r5"] == scores["img_r5"]
        assert run["values"]["alignment_cacr_V"] == scores["alignment"]["cacr"]["V"]
    assert failed["values"] is None
    difference = aligned["values"]["r_mean"] - plain["values"]["r_mean"]
    assert written_down["rows"][1]["differences"]["r_mean"]["mean"] == difference
    assert (output / "ablation.csv").read_text().count("\n") == 3
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")

    before = {file: os.stat(file).st_mtime_ns for file in output.glob("seed-1/**/*")}
    ablate.main([str(written(tmp_path, grid=[plain_run, aligned_run])), *command[3:]])
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    assert before == {file: os.stat(file).st_mtime_ns for file in output.glob("seed-1/**/*")}


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (120, 1.980)])
def test_intervals_are_students(freedom: int, t: float) -> None:
    """Half their width is t s / √n, t from the printed tables."""
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    found = estimate(values.tolist())
    half = t * values.std(ddof=1) / math.sqrt(len(values))
    assert (found.mean, found.deviation) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), rel=3e-4)

    assert estimate([0.5]) == ((0.5,), 0.5, None, None)
    assert not estimate([1.0, 2.0, 6.0]).excludes_zero()
    assert estimate([1.0, 1.1, 0.9]).excludes_zero()


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds far apart, and a difference that is nearly the same in each; a seed without its baseline is left out."""
    runs = plan(tmp_path, seeds=[1, 2, 3, 4])
    recalls = (0.2, 0.25, 0.5, 0.56, 0.8, 0.86, None, 0.1)  # of the baseline and of the other run, seed by seed
    values = {run: {"r_mean": of_run, "alignment_cacr_L": 0.125} for run, of_run in zip(runs, recalls, strict=True) if of_run}
    baseline, aligned = rows_of(runs, values)
    assert (baseline.seeds, aligned.seeds) == ([1, 2, 3], [1, 2, 3, 4])
    assert baseline.differences == {}
    assert aligned.differences["r_mean"].values == pytest.approx((0.05, 0.06, 0.06))
    text = as_markdown(runs, [baseline, aligned], values, {})
    assert "| IAIS=none | 3 | 50.00 ± 30.00 |" in text
    assert "| IAIS=cacr | 3 | +5.67 [+4.23, +7.10] \\* |" in text
    assert "| IAIS=cacr | 4 | 0.1250 ± 0.0000 |" in text
    assert "- seed 4, IAIS=none: not run" in text


def test_the_figure(tmp_path: Path) -> None:
    runs = plan(tmp_path, seeds=[1, 2])
    metrics = {run: {"r_mean": 0.01 * number, "img_r_mean": 0.3} for number, run in enumerate(runs)}
    figure = ablation_figure(rows_of(runs, metrics), "IAIS=none")
    _, both, _, difference = figure.axes
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["IAIS=none", "IAIS=cacr"]
    np.testing.assert_allclose([line.get_xdata() for line in both.lines[::3]], [[0, 2], [1, 3]])
    np.testing.assert_allclose(difference.lines[0].get_xdata(), [1, 1])
    assert difference.get_title(loc="left") == "difference to IAIS=none"
    ablate.write(runs, {runs[1]: metrics[runs[1]]}, {runs[0]: "no disk"}, tmp_path)  # one value without a baseline
    assert (tmp_path / "ablation.png").stat().st_size > 1000


@pytest.mark.parametrize("contents", ["{}", "[]", '{"alignment": null}', '{"txt_r1": NaN}'])
def test_damaged_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: str) -> None:
    path = written(tmp_path, grid=[{"margin": [0.2]}])
    grid = read_json_as(Grid, path)
    (run,) = planned(grid, path, tmp_path / "out", TrainOptions)
    for file in (run.folder / "log/results.json", scores := result_files(run, grid)[1]):
        file.parent.mkdir(parents=True)
        file.write_text(contents)
    message = fails(capsys, ablate.main, [str(path), "--output", str(tmp_path / "out")])
    assert f"{scores}: damaged" in message


def test_programs_that_a_killed_ablation_left_are_waited_for(tmp_path: Path) -> None:
    """Neither the next ablation nor the demo touches the folder of a running training."""
    log = tmp_path / "log/log.txt"
    log.parent.mkdir()
    code = "import sys, time; from pathlib import Path; from utils.files import lock; file = open(sys.argv[1], 'ab'); "
    code += "lock(file, Path()); print('locked', flush=True); time.sleep(1)"
    holder = subprocess.Popen([sys.executable, "-c", code, log], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(InputError, match="a training is running in this folder"):
        demo.remove(tmp_path)
    Programs().wait_for_others(tmp_path)
    assert holder.wait(0.1) == 0
    demo.remove(tmp_path)
    assert not tmp_path.exists()

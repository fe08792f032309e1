"""The demo: draw the scenes, train from random negatives, fine-tune without and with IAIS, evaluate, and report.

Finished steps are kept: rerunning resumes an interrupted demo or prints the table again. A training with other options is
run again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.recall import table
from evaluation.tables import fixed
from optim.options import TrainOptions
from utils.errors import InputError
from utils.files import is_locked, read_json, save_json
from utils.options import parse_options
from utils.provenance import ROOT

BEST = "ckpt/model_best.pt"


def run_demo(seed: int, data: Path = Path("demo")) -> None:
    """Run the steps not done yet under ``data`` and print the table. Raises ``InputError`` if a step fails."""
    started = time.perf_counter()
    runs, options = data / f"seed-{seed}", ["--seed", str(seed)]
    make_data(data)
    train("training from random negatives", "train-itm-scenes-start", runs / "start", *options, invalidates=runs)
    options += ["--checkpoint", str(runs / "start" / BEST)]
    train("fine-tuning without IAIS", "train-itm-scenes-hn", runs / "plain", *options)
    train("fine-tuning with IAIS singular", "train-itm-scenes-hn", runs / "singular", *options, "--IAIS", "singular")
    folders = {"random negatives (start)": "start", "without IAIS": "plain", "with IAIS singular": "singular"}
    rows = {name: evaluate(f"evaluation, {name}", data, runs / folder) for name, folder in folders.items()}
    report, picture = show(data, runs)
    columns = {
        f"align. {modality}": [fixed(row["alignment"]["singular"][modality], 4) for row in rows.values()] for modality in "LV"
    }
    columns["train s"] = [f"{read_json(runs / folder / 'log/seconds.json'):.0f}" for folder in folders.values()]
    columns["eval s"] = [f"{row['seconds']:.0f}" for row in rows.values()]
    print("\nTest split of the drawn scenes, 200 images x 5 captions: recall in percent, IAIS loss of positives, time.")
    print("These are drawings: the numbers say nothing about Flickr30k or COCO.\n")
    print(table(rows, columns))
    print(f"\nThis call took {time.perf_counter() - started:.0f} s. It wrote, among others:")
    for trained in (runs / folder for folder in folders.values()):
        print(f"  {trained / BEST}  {trained / 'log'}  {trained / 'test/scores.json'}")
    print(f"\nThe report, to open in a browser: {report}")
    print(f"The attention of one test pair without and with IAIS: {picture}")


def make_data(data: Path) -> None:
    """Draw the scenes and convert their captions and features to databases."""
    scenes, image_db = data / "scenes", data / "img_db/scenes"
    if not scenes.exists():
        run("drawing scenes", "scripts/make_scenes.py", "--output", scenes, "--seed", "0")
    for split in ("train", "val", "test"):
        text_db = data / f"txt_db/itm_scenes_{split}.db"
        if not text_db.exists():
            words = ["--annotations", scenes / "dataset_scenes.json", "--split", split, "--output", text_db]
            run(f"captions, {split}", "scripts/create_txtdb.py", *words)
    if not image_db.exists():
        run("region features", "scripts/convert_imgdir.py", "--img_dir", scenes / "features", "--output", image_db)


def train(title: str, config: str, output: Path, *options: str, invalidates: Path | None = None) -> None:
    """Train, unless a run with the same options is finished.

    A new training first deletes the folder ``invalidates``, or else ``output``, of other options or an interrupted call.
    """
    command = ["--config", f"config/{config}.json", "--output_dir", str(output), *options]
    wanted = json.loads(json.dumps(parse_options(TrainOptions, command, "").to_dict()))
    finished = (output / "log/seconds.json").exists()
    if finished and read_json(output / "log/hps.json") == wanted:
        print(f"=== {title}: kept from an earlier call (make clean to start again)")
    else:
        remove(invalidates or output)
        seconds = run(title, "train_itm_hard_negatives.py", *command)
        save_json(output / "log/seconds.json", seconds)


def remove(folder: Path) -> None:
    """Remove a folder of trainings. Raises ``InputError`` if one is running, which outlives a killed demo."""
    for log in folder.glob("**/log/log.txt"):
        if is_locked(log):
            raise InputError(f"{log.parent.parent}: a training is running in this folder; wait for it or end it")
    shutil.rmtree(folder, ignore_errors=True)


def evaluate(title: str, data: Path, trained: Path) -> dict[str, Any]:
    """Evaluate the run in the folder ``trained`` on the test split, unless done; return ``scores.json``."""
    output = trained / "test"
    if not (output / "scores.json").exists():
        databases = ["--txt_db", data / "txt_db/itm_scenes_test.db", "--img_db", data / "img_db/scenes"]
        weights = ["--checkpoint", trained / BEST, "--train_config", trained / "log/hps.json", "--n_workers", "0"]
        run(title, "inf_itm.py", *databases, *weights, "--output_dir", output)
    scores: dict[str, Any] = read_json(output / "scores.json")
    return scores


def show(data: Path, runs: Path) -> tuple[Path, Path]:
    """Report on the evaluations, and draw the attention of one test pair without and with IAIS."""
    report, picture = runs / "report", runs / "attention.png"
    shutil.rmtree(report, ignore_errors=True)
    tests = [runs / name / "test" for name in ("start", "plain", "singular")]
    run("report", "scripts/report.py", *tests, "--images", data / "scenes/images", "--output", report)
    with open(data / "scenes/winoground/examples.jsonl", "rb") as file:
        example = json.loads(next(file))
    pair = ["--text", example["caption_0"], "--image", f"{example['image_0']}.npz", "--images", data / "scenes/images"]
    boxes = ["--img_db", data / "img_db/scenes", "--train_config", runs / "singular/log/hps.json"]
    models = ["--checkpoint", runs / "plain" / BEST, runs / "singular" / BEST, *boxes]
    run("attention of one pair", "scripts/visualize.py", "pair", *models, *pair, "--output", picture)
    return report / "index.html", picture


def run(title: str, program: str, *arguments: str | Path) -> float:
    """Run one of our programs; return its seconds. Raises ``InputError`` if it fails, after its own message."""
    print(f"\n=== {title}\n$ python {program} {shlex.join(map(str, arguments))}", flush=True)
    started = time.perf_counter()
    # One thread is fastest for such a small model, and leaves a core to the process that reads the data.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, program, *map(str, arguments)], cwd=ROOT, env=environment) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # and wait for it, which may have to save
            raise
    if code:
        print(flush=True)  # ends this program, too, if nobody reads their output any more
        raise InputError(f"{program} failed with exit code {code}; fix this and run the demo again to resume it")
    return time.perf_counter() - started

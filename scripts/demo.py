"""The whole story on drawn scenes: data, a start, fine-tuning without and with IAIS, evaluation, a table, things to look at.

    python scripts/demo.py --seed 1

The scenes are drawings of coloured shapes; recalls on them say nothing about Flickr30k or COCO. What is finished is kept: a
second call goes on where an interrupted one stopped, or prints the table again; what was made with other options is made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.recall import table
from optim.options import TrainOptions
from utils.errors import InputError, one_line_errors
from utils.files import read_json, save_json
from utils.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
FINE_TUNINGS = {"without IAIS": ("plain", []), "with IAIS singular": ("singular", ["--IAIS", "singular"])}


def run(title: str, program: str, *arguments: str | Path) -> float:
    """Run one of our programs; returns its seconds. Raises ``InputError`` when it fails; it has said why itself."""
    print(f"\n=== {title}\n$ python {program} {shlex.join(map(str, arguments))}", flush=True)
    started = time.perf_counter()
    # One thread is fastest for so small a model, and leaves a core to the process that reads the data.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program, *map(str, arguments)], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise InputError(f"{program} ended with exit code {done.returncode}, the demo stops here")
    return time.perf_counter() - started


def make_data(data: Path) -> None:
    """Draw the scenes, and convert them as one converts any captions and features."""
    if not (data / "scenes").exists():
        run("drawing scenes", "scripts/make_scenes.py", "--output", data / "scenes", "--seed", "0")
    for split in ("train", "val", "test"):
        database = data / f"txt_db/itm_scenes_{split}.db"
        if not database.exists():
            annotations = data / "scenes/dataset_scenes.json"
            run(
                f"captions, {split}",
                "scripts/create_txtdb.py",
                "--annotations",
                annotations,
                "--split",
                split,
                "--output",
                database,
            )
    if not (data / "img_db/scenes").exists():
        features = data / "scenes/features"
        run("region features", "scripts/convert_imgdir.py", "--img_dir", features, "--output", data / "img_db/scenes")


def train(title: str, config: str, output: Path, stands_on_it: Path, *arguments: str) -> Path:
    """Train, unless a run with the very same options has ended; returns the best checkpoint.

    ``stands_on_it`` is the folder of what a new training makes worthless, from other options or an interrupted call.
    """
    command = ["--config", f"config/{config}.json", "--output_dir", str(output), *arguments]
    wanted = json.loads(json.dumps(parse_options(TrainOptions, command, "").to_dict()))
    finished = (output / "log/seconds.json").exists()
    if finished and read_json(output / "log/hps.json") == wanted:
        print(f"=== {title}: kept from an earlier call (make clean starts afresh)")
    else:
        shutil.rmtree(stands_on_it, ignore_errors=True)
        seconds = run(title, "train_itm_hard_negatives.py", *command)
        save_json(output / "log/seconds.json", seconds)
    return output / "ckpt/model_best.pt"


def evaluate(title: str, data: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """The test split's ``scores.json``."""
    if not (output / "scores.json").exists():
        databases = ["--txt_db", data / "txt_db/itm_scenes_test.db", "--img_db", data / "img_db/scenes"]
        weights = ["--checkpoint", checkpoint, "--train_config", folder_of(checkpoint) / "log/hps.json", "--n_workers", "0"]
        run(title, "inf_itm.py", *databases, *weights, "--output_dir", output)
    scores: dict[str, Any] = read_json(output / "scores.json")
    return scores


def folder_of(checkpoint: Path) -> Path:
    """The run that a checkpoint is of."""
    return checkpoint.parent.parent


def show(data: Path, runs: Path, checkpoints: Sequence[Path]) -> tuple[Path, Path]:
    """A report on the evaluations, and the attention of one test pair in the last two of these: before and after IAIS."""
    report, picture = runs / "report", runs / "attention.png"
    shutil.rmtree(report, ignore_errors=True)
    tests = [folder_of(checkpoint) / "test" for checkpoint in checkpoints]
    run("report", "scripts/report.py", *tests, "--images", data / "scenes/images", "--output", report)
    with open(data / "scenes/winoground/examples.jsonl", "rb") as file:
        example = json.loads(next(file))
    pair = ["--text", example["caption_0"], "--image", f"{example['image_0']}.npz", "--images", data / "scenes/images"]
    boxes = ["--img_db", data / "img_db/scenes", "--train_config", folder_of(checkpoints[-1]) / "log/hps.json"]
    models = ["--checkpoint", *checkpoints[-2:], *boxes]
    run("attention of one pair", "scripts/visualize.py", "pair", *models, *pair, "--output", picture)
    return report / "index.html", picture


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="of weights and sampling; the scenes are always the same (%(default)s)"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    os.chdir(ROOT)
    data, seed = Path("demo"), ["--seed", str(options.seed)]
    runs = data / f"seed-{options.seed}"
    make_data(data)
    start = train("training from random negatives", "train-itm-scenes-start", runs / "start", runs, *seed)
    checkpoints = {"random negatives (start)": start}
    for name, (folder, extra) in FINE_TUNINGS.items():
        arguments_of_run = ["--checkpoint", str(start), *seed, *extra]
        checkpoints[name] = train(f"fine-tuning {name}", "train-itm-scenes-hn", runs / folder, runs / folder, *arguments_of_run)
    rows = {
        name: evaluate(f"evaluation, {name}", data, checkpoint, folder_of(checkpoint) / "test")
        for name, checkpoint in checkpoints.items()
    }
    report, picture = show(data, runs, list(checkpoints.values()))
    alignment = {way: [f"{row['alignment']['singular'][way]:.4f}" for row in rows.values()] for way in "LV"}
    seconds = [read_json(folder_of(checkpoint) / "log/seconds.json") for checkpoint in checkpoints.values()]
    more = {
        "align. L": alignment["L"],
        "align. V": alignment["V"],
        "train s": [f"{value:.0f}" for value in seconds],
        "eval s": [f"{row['seconds']:.0f}" for row in rows.values()],
    }
    print("\nTest split of the drawn scenes, 200 images x 5 captions: recall in percent, IAIS loss of positives, time.")
    print("These are drawings: the numbers say nothing about Flickr30k or COCO.\n")
    print(table(rows, more))
    print(f"\nThis call took {time.perf_counter() - started:.0f} s. Among what it wrote:")
    for checkpoint in checkpoints.values():
        print(f"  {checkpoint}  {folder_of(checkpoint) / 'log'}  {folder_of(checkpoint) / 'test/scores.json'}")
    print(f"\nThe report, to open in a browser: {report}")
    print(f"The attention of one test pair without and with IAIS: {picture}")


if __name__ == "__main__":
    main()

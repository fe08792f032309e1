"""The whole story on drawn scenes: data, a starting checkpoint, fine-tuning without and with IAIS, evaluation, a table.

    python scripts/demo.py --seed 1

The scenes are drawings of coloured shapes; recalls on them say nothing about Flickr30k or COCO. What is finished is kept: a
second call goes on where an interrupted one stopped, or prints the table again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.recall import table
from utils.errors import InputError, one_line_errors
from utils.files import read_json, save_json

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"without IAIS": ("plain", []), "with IAIS singular": ("singular", ["--IAIS", "singular"])}


def run(title: str, program: str, *arguments: str | Path) -> float:
    """Run one of our programs; returns its seconds. Raises ``InputError`` when it fails; it has said why itself."""
    print(f"\n=== {title}\n$ python {program} {' '.join(map(str, arguments))}", flush=True)
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


def train(title: str, config: str, output: Path, *arguments: str | Path) -> Path:
    """Train unless it is done already; returns the best checkpoint."""
    if not (output / "log/results.json").exists():
        shutil.rmtree(output, ignore_errors=True)  # of a demo that was interrupted
        program = "train_itm_hard_negatives.py"
        seconds = run(title, program, "--config", f"config/{config}.json", "--output_dir", output, *arguments)
        save_json(output / "log/seconds.json", seconds)
    return output / "ckpt/model_best.pt"


def evaluate(title: str, data: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """The test split's ``scores.json``."""
    if not (output / "scores.json").exists():
        databases = ["--txt_db", data / "txt_db/itm_scenes_test.db", "--img_db", data / "img_db/scenes"]
        weights = ["--checkpoint", checkpoint, "--train_config", checkpoint.parent.parent / "log/hps.json", "--n_workers", "0"]
        run(title, "inf_itm.py", *databases, *weights, "--output_dir", output)
    return read_json(output / "scores.json")


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
    data, runs = Path("demo"), Path(f"demo/seed-{options.seed}")
    started = time.perf_counter()
    make_data(data)
    seed = ["--seed", str(options.seed)]
    start = train("a starting checkpoint, from random negatives", "train-itm-scenes-start", runs / "start", *seed)
    rows, notes, written = {}, [], []
    for name, (folder, extra) in RUNS.items():
        output = runs / folder
        checkpoint = train(f"fine-tuning {name}", "train-itm-scenes-hn", output, "--checkpoint", start, *seed, *extra)
        rows[name] = evaluate(f"evaluation {name}", data, checkpoint, output / "test")
        seconds = read_json(output / "log/seconds.json")
        align = rows[name]["alignment"]["singular"]
        times = f"fine-tuning {seconds:.0f} s, evaluation {rows[name]['seconds']:.0f} s"
        notes.append(f"{name}: alignment loss L {align['L']:.4f} V {align['V']:.4f}; {times}")
        written += [checkpoint, output / "log", output / "test/scores.json"]
    print("\nTest split of the drawn scenes (they say nothing about Flickr30k), 200 images x 5 captions, in percent")
    print(table(rows))
    print("\nAlignment loss (IAIS singular, mean over the positive pairs of the test split) and time")
    print("\n".join(notes))
    print(f"\nThis call took {time.perf_counter() - started:.0f} s. It wrote, for example:")
    print("\n".join(str(path) for path in [start, *written]))


if __name__ == "__main__":
    main()

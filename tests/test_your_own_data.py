"""The section of docs/data.md on your own pictures and captions, command by command, on a small sample."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from examples.scenes.dataset import Recipe
from examples.scenes.files import make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from tests.standins import ROOT, Docker, environment

DOCUMENT = ROOT / "docs/data.md"
SECTION = "## Your own pictures and captions"


def test_every_command(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", {"train": 10, "val": 4, "test": 6}, Recipe(seed=0, twins=0.0), 1)
    annotations = json.loads((tmp_path / "scenes/dataset_scenes.json").read_text())
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["image", "caption", "split"])
        table.writeheader()
        for image in annotations["images"]:
            for sentence in image["sentences"]:
                table.writerow({"image": image["filename"], "caption": sentence["raw"], "split": image["split"]})
    config = UniterConfig.from_json(ROOT / "config/uniter-tiny.json")
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "start.pt", RetrievalModel(config).state_dict())
    for name in ("config", "scripts", "inf_itm.py", "train_itm_hard_negatives.py"):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / name).symlink_to(ROOT / name)

    section = DOCUMENT.read_text().split(f"\n{SECTION}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    settings = {
        0: f"photos=../scenes/images captions=../captions.csv checkpoint=../start.pt model={ROOT}/config/uniter-tiny.json\n",
        6: "steps=2 warmup=1 negatives=7 hard=3\n",
    }
    assert blocks[0].startswith("photos=")
    assert blocks[6].startswith("steps=")
    script = "set -eux\n" + "".join(settings.get(number, block) for number, block in enumerate(blocks))
    docker = Docker(tmp_path)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path / "here",
        env=environment(
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{docker.path}",
            PYTHON=sys.executable,
            IMAGE="chenrocks/butd-caffe:nlvr2",
            INSIDE="cp ../scenes/features/*.npz mine/features/",
            OMP_NUM_THREADS=1,
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "here/runs/mine/log/results.json").read_text())
    scores = json.loads((tmp_path / "here/runs/mine/test/scores.json").read_text())
    assert scores["counts"] == {"texts": 30, "images": 6, "pairs": 180}
    assert results["test"]["r_mean"] == scores["r_mean"]

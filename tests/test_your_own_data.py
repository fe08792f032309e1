"""The section of docs/data.md on your own pictures and captions, command by command, on a small sample."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path

import torch

from examples.scenes.dataset import Recipe, make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from tests.standins import ROOT, Docker, run


def test_every_command(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", {"train": 10, "val": 4, "test": 6}, Recipe(seed=0, twins=0.0), 1)
    images = json.loads((tmp_path / "scenes/dataset_scenes.json").read_text())["images"]
    rows = [(image["filename"], text["raw"], image["split"]) for image in images for text in image["sentences"]]
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "split"), *rows])
    torch.manual_seed(0)
    tiny = ROOT / "config/uniter-tiny.json"
    save_checkpoint(tmp_path / "start.pt", RetrievalModel(UniterConfig.from_json(tiny)).state_dict())
    here = tmp_path / "here"
    here.mkdir()
    for name in ("config", "scripts", "inf_itm.py", "train_itm_hard_negatives.py"):
        (here / name).symlink_to(ROOT / name)

    section = (ROOT / "docs/data.md").read_text().split("\n## Your own pictures and captions\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert (blocks[0].split("=")[0], blocks[6].split("=")[0]) == ("photos", "steps")
    blocks[0] = f"photos=../scenes/images captions=../captions.csv checkpoint=../start.pt model={tiny}\n"
    blocks[6] = "steps=2 warmup=1 negatives=7 hard=3\n"
    changes = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{Docker(tmp_path).path}",
        "PYTHON": sys.executable,
        "IMAGE": "chenrocks/butd-caffe:nlvr2",
        "INSIDE": "cp ../scenes/features/*.npz mine/features/",
    }
    done = run("bash", "-c", "set -eux\n" + "".join(blocks), cwd=here, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    results, scores = (json.loads((here / "runs/mine" / name).read_text()) for name in ("log/results.json", "test/scores.json"))
    assert scores["counts"] == {"texts": 30, "images": 6, "pairs": 180}
    assert results["test"]["r_mean"] == scores["r_mean"]

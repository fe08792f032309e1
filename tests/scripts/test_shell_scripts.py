"""The paper's shell scripts around the converters and the detector, and which interpreter scripts/python.sh runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data.boxes import BoxRule
from data.image_db import ImageDatabase
from data.text_db import TextDatabase
from tests.standins import ROOT, Docker, executable, run, says

SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("command", [(), ("python", "other.py", "--gpu", "0 1", "*")])
def test_extraction_passes_folders_command_and_exit_code(tmp_path: Path, command: tuple[str, ...]) -> None:
    docker, output = Docker(tmp_path), tmp_path / "made, here"
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures/1.JPG").touch()
    changes = {"PATH": docker.path, "IMAGE": "mine:2", "IAIS_BUTD_IMAGE": "mine:2", "CODE": 37, "CUDA_VISIBLE_DEVICES": 3}
    done = run("bash", SCRIPTS / "extract_imgfeat.sh", "my pictures", output, *command, cwd=tmp_path, **changes)
    assert (done.returncode, done.stdout, done.stderr) == (37, "from inside\n", "")
    assert docker.recorded() == [
        *("run", "--rm", "--init", "--ipc=host", "--workdir", "/src"),
        *("--mount", f'type=bind,"source={tmp_path}/my pictures",target=/img,readonly'),
        *("--mount", f'type=bind,"source={output}",target=/output'),
        *("--gpus", '"device=3"', "mine:2"),
        *(command or ("python", "tools/generate_npz.py", "--gpu", "0")),
    ]
    assert output.is_dir()


def test_extraction_refuses_what_is_missing(tmp_path: Path) -> None:
    docker, output = Docker(tmp_path), tmp_path / "made"
    (tmp_path / "empty").mkdir()
    for name in ("file", "1.png"):
        (tmp_path / name).touch()
    for message, arguments, changes in [
        ("usage: extract_imgfeat.sh IMG_DIR IMG_NPY", [tmp_path], {}),
        (f"IMG_DIR: cannot enter folder '{tmp_path}/none'", [tmp_path / "none", output], {}),
        ("IMG_DIR: no .jpg, .jpeg or .png file", [tmp_path / "empty", output], {}),
        (f"IMG_NPY: cannot create folder '{tmp_path}/file'", [tmp_path, tmp_path / "file"], {}),
        ("the docker daemon does not answer", [tmp_path, output], {"INFO": 1}),
        ("no image 'other'; get it with 'docker pull other'", [tmp_path, output], {"IAIS_BUTD_IMAGE": "other"}),
    ]:
        image = {"PATH": docker.path, "IMAGE": "chenrocks/butd-caffe:nlvr2"}
        says(run("bash", SCRIPTS / "extract_imgfeat.sh", *arguments, **image | changes), 2, message)
        assert not docker.record.exists()


def test_create_text_databases(tmp_path: Path) -> None:
    splits = {"flickr30k": ["train", "val", "test"], "coco": ["train", "restval", "val", "test"]}
    for name, of_name in splits.items():
        images = [
            {"filename": f"COCO_val2014_{number}.jpg", "split": split, "sentences": [{"sentid": 1, "raw": "A man."}]}
            for number, split in enumerate(of_name)
        ]
        (tmp_path / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": images}))
    (tmp_path / "made/itm_coco_val.db").mkdir(parents=True)
    words = ("bash", SCRIPTS / "create_txtdb.sh", tmp_path)
    done = run(*words, tmp_path / "made", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {f"itm_{name}_{split}.db" for name, of_name in splits.items() for split in of_name}
    assert "itm_coco_val.db: exists already" in done.stdout
    assert not list((tmp_path / "made/itm_coco_val.db").iterdir())
    database = TextDatabase(tmp_path / "made/itm_coco_restval.db")
    assert list(database.images) == ["coco_val2014_000000000001.npz"]
    says(run(*words), 2, "usage: create_txtdb.sh ANN_DIR TXT_DB")
    says(run(*words[:2], tmp_path / "made", tmp_path), 2, "neither dataset_flickr30k.json nor dataset_coco.json")
    assert run(*words, tmp_path / "other", "--splits", "x").returncode == 2


def test_image_database_is_named_after_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine/a.npz", features=np.ones((3, 4)), norm_bb=[[0, 0, 0.5, 0.5, 0.5, 0.5]] * 3, conf=np.full(3, 0.5))
    words = ("bash", SCRIPTS / "create_imgdb.sh", tmp_path)
    done = run(*words[:2], tmp_path / "mine/", tmp_path / "img_db", "--conf_th", "-1", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    assert ImageDatabase(tmp_path / "img_db/mine", BoxRule(-1)).names() == ["a.npz"]
    says(run(*words), 2, "usage: create_imgdb.sh IMG_NPY IMG_DB")


def test_the_interpreter(tmp_path: Path) -> None:
    """The one in PYTHON, else that of .venv, else the newest in PATH, if it is new enough."""
    tools, copy = tmp_path / "tools", tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "python.sh", copy / "scripts")
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")

    def interpreter(path: Path, is_new: bool = True) -> Path:
        """Create a program that prints its path and arguments, and claims to be Python 3.10 if ``is_new``."""
        executable(path, f'#!/bin/sh\ncase "$2" in *version_info*) {str(is_new).lower()};; *) echo "$0" "$3";; esac\n')
        return path

    def used(code: int = 0, **changes: object) -> str:
        script = copy / "scripts/python.sh"
        done = run(tools / "bash", script, "-c", "import sys; print(sys.argv)", "a b", PATH=tools, **{"PYTHON": ""} | changes)
        assert done.returncode == code
        return done.stderr if code else done.stdout

    none = r"error: no Python 3\.10 or newer \(tried .*python3\); install one or set PYTHON=<its path>\n"
    assert re.fullmatch(none, used(2))
    old = interpreter(tools / "python3", is_new=False)
    assert re.fullmatch(none, used(2))
    new = interpreter(tools / "python3.11")
    interpreter(tools / "python3.10")
    assert used() == f"{new} a b\n"
    interpreter(copy / ".venv/bin/python")
    assert used() == f"{copy}/scripts/../.venv/bin/python a b\n"
    assert used(PYTHON=sys.executable) == "['-c', 'a b']\n"
    assert used(2, PYTHON=old).count("\n") == 1

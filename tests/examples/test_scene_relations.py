"""Scenes for the study of relations: every image has a twin of which all its captions are false."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from evaluation.ablation.grid import Grid, planned
from examples.scenes.captions import CAPTIONS
from examples.scenes.dataset import Recipe, captions_of, plan, scene_of, twins_of
from model.iais import REGULARISERS
from scripts.make_scenes import main
from tests.forks import ROOT
from tests.test_programs import fails
from utils.options import read_json_as

COUNTS = {"train": 12, "val": 2, "test": 8}
RECIPE = Recipe(5, twins=1.0, items=(2, 4), relations=5)


def test_every_caption_of_a_twin_is_false_of_the_other_and_made_of_the_same_words() -> None:
    jobs = [job for job in plan({"train": 80, "val": 2, "test": 2}, RECIPE) if job.split == "train"]
    pairs = twins_of(jobs)
    assert len(pairs) == 40
    sizes = set()
    for pair in pairs:
        scenes = [scene_of(job, RECIPE) for job in pair]
        sizes.add(len(scenes[0].items))
        both = [captions_of(job, scene, RECIPE) for job, scene in zip(pair, scenes, strict=True)]
        for one, other in zip(*both, strict=True):
            assert [one.holds(scene.items) for scene in scenes] == [True, False]
            assert [other.holds(scene.items) for scene in scenes] == [False, True]
            assert sorted(one.tokens) == sorted(other.tokens)
        for captions in both:
            assert len({caption.raw for caption in captions}) == CAPTIONS
    assert sizes == {2, 3, 4}


def test_the_files_of_such_a_dataset(tmp_path: Path) -> None:
    numbers = [word for split, count in COUNTS.items() for word in (f"--{split}", str(count))]
    made = tmp_path / "scenes"
    main(["--output", str(made), "--twins", "1", "--items", "2", "2", "--relations", "5", "--workers", "1", *numbers])
    twins = json.loads((made / "twins.json").read_text())
    names = {path.name for path in (made / "features").iterdir()}
    assert set(twins) == names
    assert all(twins[other] == [name] for name, (other,) in twins.items())
    images = json.loads((made / "dataset_scenes.json").read_text())["images"]
    split_of = {image["filename"].replace(".jpg", ".npz"): image["split"] for image in images}
    assert all(split_of[name] == split_of[other] for name, (other,) in twins.items())
    assert all(len(image["sentences"]) == CAPTIONS for image in images)
    assert len((made / "winoground/examples.jsonl").read_text().splitlines()) == COUNTS["test"]
    assert "--items 2 2 --relations 5" in (made / "README.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--relations", "1"], "--relations 1: expected 2 to 5"),
        (["--items", "2", "4"], "--items 2 4: expected two numbers from 3 to 6"),
        (["--items", "4", "2", "--relations", "5"], "--items 4 2: expected two numbers from 2 to 6, the smaller first"),
        (["--items", "3", "7"], "--items 3 7: expected"),
    ],
)
def test_impossible_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in fails(capsys, main, ["--output", str(tmp_path / "scenes"), *options])
    assert not list(tmp_path.iterdir())


def test_the_shipped_ablation_is_of_the_shipped_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    for name in ("txt_db/itm_scenes_test.db", "img_db/scenes", "scenes/winoground/examples.jsonl"):
        (tmp_path / "demo/relations" / name).mkdir(parents=True)
    path = "config/ablation-scenes-relations.json"
    runs = planned(read_json_as(Grid, path), path, tmp_path / "out")
    assert {run.options.IAIS for run in runs} == {None, *REGULARISERS}
    assert Counter(run.seed for run in runs) == dict.fromkeys(range(1, 6), 1 + len(REGULARISERS))
    assert runs[0].options.IAIS is None  # the baseline
    assert runs[0].options.neighbours == "demo/relations/scenes/twins.json"

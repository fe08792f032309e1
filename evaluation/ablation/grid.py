"""What an ablation runs: the grid in its JSON file, multiplied out into trainings with all their options."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from optim.options import TrainOptions
from utils.errors import InputError
from utils.options import options_from, read_options, require

START = "start"
# The result does not depend on these, and all others make it another run.
RESULT_NEUTRAL = (
    "output_dir",
    "resume",
    "n_workers",
    "pin_mem",
    "image_cache",
    "save_steps",
    "keep_checkpoints",
    "checkpointing",
)
RESERVED = ("seed", "output_dir", "resume", "test_txt_db", "test_img_db")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The keys of the JSON file (docs/training.md).

    Attributes:
        config: a training's JSON file, whose options all runs have.
        start: another one; its best checkpoint, made once for each seed, is what all runs of that seed start from.
        options: options of all runs, that of ``start`` included, such as the databases; they win over both files.
        grid: products, option → values, which win over ``options``; the runs are those of all products, the first the baseline.
        checkpoint: which of a run's checkpoints is evaluated, that of the best validation or that of the end.
    """

    config: str = ""
    start: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[dict[str, list[Any]], ...] = ()
    seeds: tuple[int, ...] = ()
    checkpoint: Literal["best", "last"] = "best"
    test_txt_db: str = ""
    test_img_db: str = ""
    winoground_examples: str | None = None
    winoground_img_db: str | None = None

    def __post_init__(self) -> None:
        require(self, "config", "grid", "seeds", "test_txt_db", "test_img_db")
        if bool(self.winoground_examples) != bool(self.winoground_img_db):
            raise InputError(
                "winoground_examples and winoground_img_db: one is given without the other, expected both or neither"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}, expected different ones")
        for name in ("config", "start", "test_txt_db", "test_img_db", "winoground_examples", "winoground_img_db"):
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise InputError(f"{name} {path}: no such file or folder")
        for values in (self.options, *self.grid):
            for name in (*RESERVED, "checkpoint") if self.start else RESERVED:
                if name in values:
                    raise InputError(f"{name} is given among options or in grid, expected none: every run gets its own")
        for values in self.grid:
            if not values or not all(values.values()):
                raise InputError(f"grid has {json.dumps(values)}, expected options with a list of values each")

    def points(self) -> Iterator[dict[str, Any]]:
        """The options in which the runs of a seed differ."""
        for values in self.grid:
            for chosen in product(*values.values()):
                yield dict(zip(values, chosen, strict=True))


@dataclass(frozen=True)
class Run:
    """A training, and what it starts from if that is to be made first.

    Attributes:
        name: the same for all seeds.
        digest: of what the result depends on.
    """

    name: str
    seed: int
    options: TrainOptions
    digest: str
    start: Run | None = None

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.name}"

    def weights(self, which: str) -> Path:
        """Its checkpoint ``"best"`` or ``"last"``."""
        return self.folder / f"ckpt/model_{which}.pt"


def planned(grid: Grid, path: str | Path, output: Path) -> list[Run]:
    """All trainings, seed after seed, that from which the others start first.

    The folder of each has its name and a digest of its options, so that other options mean another folder.

    Raises:
        InputError: a value is impossible, or a run comes twice.
    """
    points = {_name(point): point for point in grid.points()}
    twice = [name for name, count in Counter(map(_name, grid.points())).items() if count > 1]
    if twice:
        raise InputError(f"{path}: grid has {twice[0]} twice, expected each run once")
    runs = []
    for seed in grid.seeds:
        start = None
        if grid.start:
            start = _run(START, read_options(grid.start) | grid.options, seed, output, f"{path}: with {grid.start}", None)
            runs.append(start)
        config = read_options(grid.config) | grid.options
        for name, point in points.items():
            runs.append(_run(name, config | point, seed, output, f"{path}: {name} with {grid.config}", start))
    return runs


def _run(name: str, values: dict[str, Any], seed: int, output: Path, source: str, start: Run | None) -> Run:
    ours = {"seed": seed, "output_dir": str(output), "resume": None, "test_txt_db": "", "test_img_db": ""}
    if start:
        ours["checkpoint"] = str(start.weights("best"))
    options = options_from(TrainOptions, values | ours, source)
    decisive = {key: value for key, value in options.to_dict().items() if key not in RESULT_NEUTRAL}
    if start:
        decisive["checkpoint"] = start.digest
    digest = digest_of(decisive)
    readable = re.sub(r"[^\w=.,+-]+", "_", name.replace(", ", ","))[:80]
    folder = output / f"seed-{seed}" / f"{readable}-{digest}"
    return Run(name, seed, replace(options, output_dir=str(folder)), digest, start)


def digest_of(values: Any) -> str:
    """Eight letters that are others for other values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _name(point: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in point.items())


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return "+".join(map(_shown, value)) if isinstance(value, list) else str(value)

"""The grid of an ablation: read from its JSON file and expanded into trainings with all their options."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from utils.errors import InputError
from utils.files import read_object
from utils.options import MachineOptions, options_from, require

START = "start"
# Options that do not change a run's result; any other option names another run. This is less than what `affects_result=False`
# covers: a training may be resumed with its databases moved or on another device, but to an ablation these are other runs. A
# path or a precision missing from a list of exceptions would mix up results, so this list names what is safe to ignore.
RESULT_NEUTRAL = {"output_dir", "resume", "save_steps", "keep_checkpoints"}
RESULT_NEUTRAL |= {"n_workers", "pin_mem", "image_cache", "checkpointing"}
RESERVED = ("seed", "output_dir", "resume", "test_txt_db", "test_img_db")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The keys of the JSON file (docs/training.md)."""

    config: str = ""  # JSON file with the options of every training
    start: str | None = None  # JSON file of a training, once per seed, whose best checkpoint all runs of the seed start from
    options: dict[str, Any] = field(default_factory=dict)  # of all runs and of `start`; they override both files
    grid: tuple[dict[str, list[Any]], ...] = ()  # products, option → values, which override `options`; first is the baseline
    seeds: tuple[int, ...] = ()
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of a run is evaluated: best in validation, or last
    test_txt_db: str = ""
    test_img_db: str = ""
    winoground_examples: str | None = None
    winoground_img_db: str | None = None

    def __post_init__(self) -> None:
        require(self, "config", "grid", "seeds", "test_txt_db", "test_img_db")
        if bool(self.winoground_examples) != bool(self.winoground_img_db):
            raise InputError("winoground_examples and winoground_img_db: only one is given, expected both or neither")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}, expected distinct seeds")
        for name in ("config", "start", "test_txt_db", "test_img_db", "winoground_examples", "winoground_img_db"):
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise InputError(f"{name} {path}: no such file or folder")
        for values in (self.options, *self.grid):
            for name in (*RESERVED, "checkpoint") if self.start else RESERVED:
                if name in values:
                    raise InputError(f"{name} is given among options or in grid; remove it, the ablation sets it for every run")
        for values in self.grid:
            if not values or not all(values.values()):
                raise InputError(f"grid has {json.dumps(values)}, expected options with a list of values each")


@dataclass(frozen=True)
class Run:
    """A training."""

    name: str  # the same for all seeds
    seed: int
    folder: Path
    options: MachineOptions
    digest: str  # of the options that the result depends on
    start: Run | None = None  # whose checkpoint this one starts from, if the ablation trains that first

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.name}"

    def weights(self, which: str) -> Path:
        """The checkpoint ``"best"`` or ``"last"``."""
        return self.folder / f"ckpt/model_{which}.pt"


def planned(grid: Grid, path: str | Path, output: Path, options_type: type[MachineOptions]) -> list[Run]:
    """Return all trainings with the options ``options_type`` for the grid in file ``path``: each seed's start, then its runs.

    A run's folder is named after the run and a digest of its options, so that other options get another folder. Raises
    ``InputError`` if a value is impossible, or a run is listed twice.
    """
    points: dict[str, dict[str, Any]] = {}
    for values in grid.grid:
        for combination in product(*values.values()):
            name = ", ".join(f"{option}={_as_text(value)}" for option, value in zip(values, combination, strict=True))
            if name in points:
                raise InputError(f"{path}: grid has {name} twice, expected each run once")
            points[name] = dict(zip(values, combination, strict=True))

    def run(name: str, seed: int, config: str, point: dict[str, Any], start: Run | None = None) -> Run:
        reserved = {"seed": seed, "output_dir": str(output), "resume": None, "test_txt_db": "", "test_img_db": ""}
        if start:
            reserved["checkpoint"] = str(start.weights("best"))
        values = read_object(config) | grid.options | point | reserved
        options = options_from(options_type, values, f"{path}: {name} with {config}")
        relevant = {key: value for key, value in asdict(options).items() if key not in RESULT_NEUTRAL}
        if start:
            relevant["checkpoint"] = start.digest
        digest = digest_of(relevant)
        readable = re.sub(r"[^\w=.,+-]+", "_", name.replace(", ", ","))[:80]
        folder = output / f"seed-{seed}" / f"{readable}-{digest}"
        with_folder: dict[str, Any] = {"output_dir": str(folder)}
        return Run(name, seed, folder, replace(options, **with_folder), digest, start)

    runs = []
    for seed in grid.seeds:
        start = run(START, seed, grid.start, {}) if grid.start else None
        runs += [start] if start else []
        runs += [run(name, seed, grid.config, point, start) for name, point in points.items()]
    return runs


def digest_of(values: Any) -> str:
    """Return eight hexadecimal digits that identify JSON ``values``."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return "+".join(map(_as_text, value)) if isinstance(value, list) else str(value)

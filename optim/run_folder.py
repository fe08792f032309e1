"""The folder of a training: its logs, its checkpoints, and from which of them a run goes on.

    log/hps.json model.json git.json log.txt results.json …    ckpt/state-N.pt model_last.pt model_best.pt

``state-N.pt`` is the whole training state after N updates; the others hold weights alone.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from data.split import RetrievalSplit
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import LATEST, TrainOptions
from optim.progress import Progress
from utils.distributed import ProcessGroup
from utils.errors import InputError
from utils.files import make_folder, new_folder, remove_leftovers, save_json, sha256
from utils.logging import RunLog
from utils.provenance import save_git_state
from utils.tensors import load_tensors, save_tensors

LOGGER = logging.getLogger(__name__)
OF_TRAINER = {"model", "optimiser", "scaler"}
PARTS = OF_TRAINER | {"progress", "best_weights", "recipe", "machine"}


class RunFolder:
    """Opens the folder ``options.output_dir``, new or, with ``options.resume``, that of a run to go on with.

    Use it as a context manager: within it, messages also go to ``log/log.txt``. Worker 0 alone has a folder; for the others
    every method does nothing.

    Args:
        recipe: what the result depends on, see ``recipe_of``.
        machine: what else its last digits depend on, and may change with a warning, by name.

    Raises:
        InputError: the folder is not empty, or cannot be made; with ``resume``, there is no such state, it is damaged, or it is
            of a run with another recipe; another run is at work in the folder.
    """

    def __init__(
        self,
        options: TrainOptions,
        recipe: dict[str, Any],
        machine: dict[str, Any],
        config: UniterConfig,
        group: ProcessGroup,
    ) -> None:
        self._state: dict[str, Any] | None = None
        self.writes = group.is_main
        if not self.writes:
            return
        self.path = Path(options.output_dir)
        self.keep = options.keep_checkpoints
        self.recipe, self.machine = recipe, machine
        self.best_weights: dict[str, Tensor] = {}
        self._saved = Progress()  # in the newest state
        source = self._source(options.resume)
        if source is not None:
            try:
                self._state = state = self._read(source)
            except InputError as error:
                older = self._states()[:-1] if options.resume == LATEST else []
                hint = f"; without that file --resume goes on from {older[-1].name}" if older else ""
                raise InputError(f"{error}{hint}") from error
            self._saved, self.best_weights = Progress(**state["progress"]), state["best_weights"]
        if not (options.resume and self._is_of_a_run()):
            new_folder(self.path)
        self.log = RunLog(make_folder(self.path / "log"), self._saved.updates)
        for name in ("log", "ckpt"):
            remove_leftovers(make_folder(self.path / name))
        # Without "resume", since a run that takes these options as its --config is another one.
        save_json(self.path / "log/hps.json", options.to_dict() | {"resume": None})
        save_json(self.path / "log/model.json", config.to_dict())
        save_git_state(self.path / "log")
        if source is None:
            return
        LOGGER.info("going on from %s", source)
        for name, now in machine.items():
            if (before := state["machine"].get(name)) != now:
                LOGGER.warning("%s: was %s, is %s: the result will not be that of an uninterrupted run", name, before, now)
        # A kill may have come between the state and these.
        save_checkpoint(self.path / "ckpt/model_last.pt", state["model"])
        if self.best_weights:
            save_checkpoint(self.path / "ckpt/model_best.pt", self.best_weights)

    def take_state(self) -> dict[str, Any] | None:
        """The training state to go on from, {"progress", "model", "optimiser", "scaler"}, handed over; None in a new run."""
        state, self._state = self._state, None
        return None if state is None else {part: state[part] for part in OF_TRAINER | {"progress"}}

    def save(self, progress: Progress, state: dict[str, Any]) -> None:
        """Write the training state, ``state`` being the trainer's, and drop older ones than the options keep.

        Raises:
            InputError: the disk refuses, or a number is not finite; older states are still there.
        """
        if not self.writes or progress == self._saved:
            return
        path = self._path_of(progress.updates)
        more = {"progress": dataclasses.asdict(progress), "best_weights": self.best_weights}
        try:
            save_tensors(path, {**state, **more, "recipe": self.recipe, "machine": self.machine})
        except InputError as error:
            states = self._states()
            rest = f"{states[-1]} is whole, --resume goes on from it" if states else "there is no older one"
            raise InputError(f"{error}; {rest}") from error
        self._saved = dataclasses.replace(progress)
        for old in self._states()[: -self.keep]:
            if old != self._path_of(progress.best_update):
                old.unlink()

    def save_weights(self, name: str, model: RetrievalModel) -> None:
        """Write ``ckpt/model_{name}.pt``."""
        if self.writes:
            save_checkpoint(self.path / f"ckpt/model_{name}.pt", model.state_dict())

    def save_best(self, model: RetrievalModel) -> None:
        """Keep these weights as the best so far, and write them."""
        if self.writes:
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            save_checkpoint(self.path / "ckpt/model_best.pt", self.best_weights)

    def load_best(self, model: RetrievalModel) -> None:
        """Put the best weights into ``model``."""
        if self.writes:
            model.load_state_dict(self.best_weights)

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write ``log/results.json``."""
        if self.writes:
            save_json(self.path / "log/results.json", results)

    def scalars(self, kind: str, values: Mapping[str, float], updates: int) -> None:
        """Record ``values`` for TensorBoard, under ``kind/``."""
        if self.writes:
            self.log.scalars({f"{kind}/{name}": value for name, value in values.items()}, updates)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writes:
            self.log.__exit__(kind, error, trace)

    def _path_of(self, updates: int) -> Path:
        return self.path / f"ckpt/state-{updates}.pt"

    def _states(self) -> list[Path]:
        """The training states, oldest first."""
        found = (re.fullmatch(r"state-(\d+)\.pt", path.name) for path in self.path.glob("ckpt/state-*.pt"))
        return [self._path_of(number) for number in sorted(int(match[1]) for match in found if match)]

    def _is_of_a_run(self) -> bool:
        return (self.path / "log").is_dir()

    def _source(self, resume: str | None) -> Path | None:
        """The state to go on from, if any."""
        states = self._states()
        if resume is None:
            if states:
                raise InputError(
                    f"output_dir {self.path}: holds a run with {states[-1].name}, expected a new or empty folder, "
                    "or --resume to go on with it"
                )
            return None
        if resume == LATEST:
            if not states:
                LOGGER.warning("%s: no training state to resume from, so this run starts from the beginning", self.path)
            return states[-1] if states else None
        source = Path(resume)
        if states and source.resolve() != states[-1].resolve():
            raise InputError(
                f"output_dir {self.path}: holds another state, {states[-1].name}, expected a new or empty folder "
                f"to go on from {source}"
            )
        return source

    def _read(self, source: Path) -> dict[str, Any]:
        """A training state, which has to be one of this very run."""
        state = load_tensors(source)
        if not isinstance(state, dict) or state.keys() != PARTS:
            raise InputError(f"{source}: not a training state, expected a ckpt/state-N.pt of a run")
        _check_recipe(source, state["recipe"], self.recipe)
        return state


def recipe_of(
    options: TrainOptions,
    training: Sequence[RetrievalSplit],
    val: RetrievalSplit,
    config: UniterConfig,
    compute: ComputeSettings,
) -> dict[str, Any]:
    """What the result of a training depends on: the options that are not free, and what the free ones among them stand for."""
    recipe = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.metadata["affects_result"]
    }
    data = [source.fingerprint() for source in training]
    recipe |= {f"train_{kind}s": [fingerprint[kind] for fingerprint in data] for kind in ("txt_db", "img_db")}
    recipe |= {f"val_{kind}": [value] for kind, value in val.fingerprint().items()}
    recipe["neighbours"] = sha256(options.neighbours) if options.neighbours else None
    precisions = {"precision": compute.precision.name}
    if options.mining == "hard":
        precisions["mining_precision"] = compute.for_mining().precision.name
    return recipe | {"model_config": config.to_dict(), **precisions}


def _check_recipe(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``InputError`` that names what would change the result of the run whose state this is."""
    changed = []
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        if before != after:
            held = isinstance(before, list | dict) or isinstance(after, list | dict)
            changed.append(f"what {name} names" if held else f"{name} (was {before}, is {after})")
    if changed:
        raise InputError(f"{path}: of a run with other options: {', '.join(changed)}; the result depends on them")

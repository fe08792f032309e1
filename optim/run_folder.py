"""The folder of a training run: its logs, its checkpoints, its progress, and the state to resume from.

    log/hps.json model.json git.json log.txt results.json …    ckpt/state-N.pt model_last.pt model_best.pt

``state-N.pt`` is the whole training state after N updates; the other checkpoints hold weights alone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from torch import Tensor

from data.split import RetrievalSplit
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import LATEST, TrainOptions
from optim.trainer import Trainer, UpdateTerms
from utils.distributed import ProcessGroup
from utils.errors import InputError, Interrupted, RankLost, counted
from utils.files import make_folder, new_folder, remove_leftovers, save_json, sha256
from utils.logging import RunLog, progress_bar
from utils.parallel import WorkerFailed
from utils.provenance import save_git_state
from utils.tensors import load_tensors, save_tensors

LOGGER = logging.getLogger(__name__)
STATE_PARTS = {"model", "optimiser", "scaler", "progress", "best_weights", "recipe", "machine"}


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        updates: updates done.
        skipped: those of them that fp16 scaling skipped because their gradient was not finite.
        validated: the update after which the last validation ran.
        best_update, best: the update with the best validation, and its recalls.
    """

    updates: int = 0
    skipped: int = 0
    validated: int = 0
    best_update: int = 0
    best: dict[str, float] = field(default_factory=dict)


class RunFolder:
    """A run in the folder ``options.output_dir``, new or, with ``options.resume``, resumed. Use it as a context manager.

    Within it, messages also go to ``log/log.txt``. Every rank calls the same methods; rank 0 writes.

    Args:
        recipe: what the result depends on, see ``recipe_of``.
        machine: what else the last digits depend on, by name; it may change with a warning.

    Raises:
        InputError: the folder is not empty or cannot be created; another run is active in it; or, with ``resume``, the state
            does not exist, is damaged, or belongs to a run with another recipe.
    """

    def __init__(
        self, options: TrainOptions, recipe: dict[str, Any], machine: dict[str, Any], config: UniterConfig, group: ProcessGroup
    ) -> None:
        self.options, self.recipe, self.machine, self.group = options, recipe, machine, group
        self.path = Path(options.output_dir)
        self.progress = Progress()
        self._state: dict[str, Any] | None = None
        self._bar: Any = None
        if not group.is_main:
            return
        self._best_weights: dict[str, Tensor] = {}
        self._saved = Progress()  # in the newest state
        source = self._state_to_resume(options.resume)
        if source is not None:
            try:
                self._state = state = self._read(source)
            except InputError as error:
                raise InputError(f"{error}{self._older_than(source)}") from error
            self._saved, self._best_weights = Progress(**state["progress"]), state["best_weights"]
        if not (options.resume and (self.path / "log").is_dir()):
            new_folder(self.path)
        self.log = RunLog(make_folder(self.path / "log"), self._saved.updates)
        for name in ("log", "ckpt"):
            remove_leftovers(make_folder(self.path / name))
        # Without "resume": a run that reads these options as its --config is a new one.
        save_json(self.path / "log/hps.json", options.to_dict() | {"resume": None})
        save_json(self.path / "log/model.json", config.to_dict())
        save_git_state(self.path / "log")
        if source is None:
            return
        LOGGER.info("resuming from %s", source)
        for name, now in machine.items():
            if (before := state["machine"].get(name)) != now:
                LOGGER.warning("%s: was %s, is %s: the result may differ in its last digits", name, before, now)
        # A kill may have come between the state and these.
        save_checkpoint(self.path / "ckpt/model_last.pt", state["model"])
        if self._best_weights:
            save_checkpoint(self.path / "ckpt/model_best.pt", self._best_weights)

    def restore(self, trainer: Trainer) -> None:
        """Restore the state to resume from, if any, on every rank, and start the progress bar. Collective."""
        parts = ("model", "optimiser", "scaler", "progress")
        state = self.group.share(self._state and {part: self._state[part] for part in parts})
        self._state = None
        if state is not None:
            trainer.restore(state)
            self.progress = Progress(**state["progress"])
        steps, done = self.options.num_train_steps, self.progress.updates
        self._bar = progress_bar(self.group.is_main, total=steps, initial=done, desc="training")

    def finished(self) -> bool:
        """Whether only the final evaluation is left."""
        return self.progress.updates == self.options.num_train_steps == self.progress.validated

    def validation_due(self) -> bool:
        """Whether to validate before the next update."""
        updates, options = self.progress.updates, self.options
        return updates > self.progress.validated and (updates == options.num_train_steps or updates % options.valid_steps == 0)

    def record_update(self, terms: UpdateTerms) -> None:
        """Count an update, and log its scalars."""
        self.progress.updates += 1
        self.progress.skipped += terms.skipped
        scalars = terms.scalars | ({"skipped": self.progress.skipped} if self.progress.skipped else {})
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in scalars.items()}, refresh=False)
        self._bar.update()
        self._log("train", scalars)

    def record_validation(self, recalls: dict[str, float], model: RetrievalModel) -> None:
        """Log a validation, and keep the weights if it is the best so far by mean recall."""
        self.progress.validated = self.progress.updates
        if not self.progress.best or recalls["r_mean"] > self.progress.best["r_mean"]:
            self.progress.best_update, self.progress.best = self.progress.updates, recalls
            if self.group.is_main:
                self._best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                save_checkpoint(self.path / "ckpt/model_best.pt", self._best_weights)
        self._log("val", recalls)
        if self.finished():
            self._bar.close()
        percent = "  ".join(f"{name} {100 * value:.2f}" for name, value in recalls.items())
        LOGGER.info("after %s, validation: %s", counted(self.progress.updates, "update"), percent)

    def record_test(self, recalls: dict[str, float] | None) -> None:
        """Log the test recalls of the best checkpoint, if there are any, and write ``log/results.json``."""
        results = {"best_update": self.progress.best_update, "validation": self.progress.best}
        if recalls is not None:
            self._log("test", recalls)
            results["test"] = recalls
        if self.group.is_main:
            save_json(self.path / "log/results.json", results)

    def save_if_due(self, trainer: Trainer) -> None:
        """Save every ``save_steps`` updates, before a validation, which may take long, and after it. Raises as ``save``."""
        updates = self.progress.updates
        if updates % self.options.save_steps == 0 or self.validation_due() or self.progress.validated == updates:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the training state, and delete older ones beyond ``keep_checkpoints``.

        Raises:
            InputError: the file cannot be written, or a number is not finite; older states are kept.
        """
        progress = self.progress
        if not self.group.is_main or progress == self._saved:
            return
        state = trainer.state() | {"progress": dataclasses.asdict(progress), "best_weights": self._best_weights}
        try:
            save_tensors(self._state_path(progress.updates), state | {"recipe": self.recipe, "machine": self.machine})
        except InputError as error:
            raise InputError(f"{error}; {self.how_to_resume()}") from error
        self._saved = dataclasses.replace(progress)
        for old in self._states()[: -self.options.keep_checkpoints]:
            if old != self._state_path(progress.best_update):
                old.unlink()
        if self.validation_due():
            save_checkpoint(self.path / "ckpt/model_last.pt", state["model"])

    def how_to_resume(self) -> str:
        """Return the newest state's name, and the command that resumes from it."""
        states = self._states()
        what = f"saved {states[-1]}; resume" if states else "nothing saved yet; restart"
        launcher = "the same launcher and " if self.group.world_size > 1 else ""
        config = quote(str(self.path / "log/hps.json"))
        return f"{what} with {launcher}python train_itm_hard_negatives.py --config {config} --resume"

    def load_best(self, model: RetrievalModel) -> None:
        """Load the best weights into ``model`` on every rank. Collective."""
        if self.group.is_main:
            model.load_state_dict(self._best_weights)
        self.group.broadcast(model.state_dict().values())

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.group.is_main:
            self.log.__exit__(kind, error, trace)
            if isinstance(error, Interrupted | RankLost | WorkerFailed):
                error.args = (f"{error}; {self.how_to_resume()}",)

    def _log(self, kind: str, values: Mapping[str, float]) -> None:
        if self.group.is_main:
            self.log.scalars({f"{kind}/{name}": value for name, value in values.items()}, self.progress.updates)

    def _state_path(self, updates: int) -> Path:
        return self.path / f"ckpt/state-{updates}.pt"

    def _states(self) -> list[Path]:
        """The training states, oldest first."""
        matches = (re.fullmatch(r"state-(\d+)\.pt", path.name) for path in self.path.glob("ckpt/state-*.pt"))
        return [self._state_path(number) for number in sorted(int(match[1]) for match in matches if match)]

    def _state_to_resume(self, resume: str | None) -> Path | None:
        states = self._states()
        if resume is None:
            if states:
                raise InputError(
                    f"output_dir {self.path}: already holds a run ({states[-1].name}); choose a new or empty folder, or add "
                    "--resume to continue it"
                )
            return None
        if resume == LATEST:
            if not states:
                LOGGER.warning("%s: no training state to resume from; starting from the beginning", self.path)
            return states[-1] if states else None
        if states and os.path.realpath(resume) != os.path.realpath(states[-1]):
            raise InputError(
                f"output_dir {self.path}: already holds another state ({states[-1].name}); choose a new or empty folder to "
                f"resume from {resume}"
            )
        return Path(resume)

    def _older_than(self, damaged: Path) -> str:
        """A hint that names the newest state before ``damaged`` that can be resumed; "" if there is none."""
        *older, newest = self._states() or [Path()]
        for state in reversed(older if os.path.realpath(newest) == os.path.realpath(damaged) else []):
            with suppress(InputError):
                self._read(state)
                return f"; {state.name} is whole, remove the later ones to resume from it"
        return ""

    def _read(self, source: Path) -> dict[str, Any]:
        """A training state, which has to belong to this very run."""
        state = load_tensors(source)
        if not isinstance(state, dict) or state.keys() != STATE_PARTS:
            raise InputError(f"{source}: not a training state; expected a run's ckpt/state-N.pt")
        changed = []
        for name in sorted(state["recipe"].keys() | self.recipe.keys()):
            before, now = state["recipe"].get(name), self.recipe.get(name)
            if before != now:
                is_contents = isinstance(before, list | dict) or isinstance(now, list | dict)
                changed.append(f"the contents of {name}" if is_contents else f"{name} (was {before}, is {now})")
        if changed:
            raise InputError(
                f"{source}: cannot be resumed with other options, as the result depends on {', '.join(changed)}; restore them "
                "or start a new run in another output_dir"
            )
        return state


def recipe_of(
    options: TrainOptions,
    training: Sequence[RetrievalSplit],
    val: RetrievalSplit,
    config: UniterConfig,
    compute: ComputeSettings,
) -> dict[str, Any]:
    """What the result of a training depends on: options that affect it, and the contents of the files that others name."""
    names = [option.name for option in dataclasses.fields(options) if option.metadata["affects_result"]]
    recipe = {name: getattr(options, name) for name in names}
    fingerprints = [split.fingerprint() for split in training]
    recipe |= {f"train_{kind}s": [fingerprint[kind] for fingerprint in fingerprints] for kind in ("txt_db", "img_db")}
    recipe |= {f"val_{kind}": [value] for kind, value in val.fingerprint().items()}
    recipe["neighbours"] = sha256(options.neighbours) if options.neighbours else None
    precisions = {"precision": compute.precision.name}
    if options.mining == "hard":
        precisions["mining_precision"] = compute.for_mining().precision.name
    return recipe | {"model_config": config.to_dict(), **precisions}

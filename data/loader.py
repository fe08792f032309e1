"""Batches of a task, read ahead by worker processes and moved to the device."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import InputError
from utils.signals import leave_to_parent


class Batch(Protocol):
    """What a task makes: a ``PairBatch`` or a ``AnchorBatch``."""

    def to(self: Item, device: torch.device) -> Item:
        """The same on ``device``."""


Item = TypeVar("Item", bound=Batch)


@dataclass(frozen=True)
class Loader:
    """How to read: ``workers`` processes (0: this one), and whether into page-locked memory for the copy to a GPU."""

    device: torch.device
    workers: int = 0
    pin: bool = False

    def __call__(self, task: Dataset[Item], numbers: Sequence[int] | None = None) -> Iterator[Item]:
        """The batches of ``task`` with these ``numbers``, all by default, in their order and on the device.

        Raises:
            InputError: as the task does, also where a worker process met it.
        """
        loader = DataLoader(
            _ErrorsAsValues(task),
            batch_size=None,
            sampler=range(len(task)) if numbers is None else numbers,  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.pin and self.device.type == "cuda",
            collate_fn=_same,
            worker_init_fn=_at_start,
            generator=torch.Generator(),  # the default one is dropout's, and starting a loader would draw from it
        )
        for item in loader:
            if isinstance(item, InputError):
                raise item
            yield item.to(self.device)


class _ErrorsAsValues(Dataset[Item | InputError]):
    """Hands over a user's error as a value: raised in a worker, it would arrive with that worker's traceback in its message."""

    def __init__(self, task: Dataset[Item]) -> None:
        self.task = task

    def __getitem__(self, number: int) -> Item | InputError:
        try:
            return self.task[number]
        except InputError as error:
            return error


def _same(item: Item) -> Item:
    return item


def _at_start(worker: int) -> None:
    leave_to_parent()


def _kill_readers() -> None:
    """After an exception some may still be there; multiprocessing would ask them by SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain about their end
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_kill_readers)

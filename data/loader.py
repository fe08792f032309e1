"""Batches of a dataset, read ahead by worker processes and moved to the device."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import AnchorBatch, PairBatch
from utils.errors import InputError
from utils.signals import leave_to_parent

Item = TypeVar("Item", PairBatch, AnchorBatch)


@dataclass(frozen=True)
class Loader:
    """How to read: in ``workers`` processes (0: this one), and whether into page-locked memory for the copy to a GPU."""

    device: torch.device
    workers: int = 0
    pin: bool = False

    def __call__(self, dataset: Dataset[Item], indices: Sequence[int] | None = None) -> Iterator[Item]:
        """Yield the batches with these ``indices``, all by default, on the device. Raises the dataset's ``InputError``."""
        loader = DataLoader(
            _ErrorsAsValues(dataset),
            batch_size=None,
            sampler=range(len(dataset)) if indices is None else indices,  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.pin and self.device.type == "cuda",
            collate_fn=_identity,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default one is dropout's, and starting a loader would draw from it
        )
        for item in loader:
            if isinstance(item, InputError):
                raise item
            yield item.to(self.device)


class _ErrorsAsValues(Dataset[Any]):
    """Returns an ``InputError`` instead of raising it: raised in a worker, its message would contain the worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def _identity(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    leave_to_parent()


def _kill_workers() -> None:
    """Kill workers that an exception left behind: multiprocessing would send them SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain that they died
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_kill_workers)

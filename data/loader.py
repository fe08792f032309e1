"""Batches of a dataset, read ahead by worker processes and moved to the device.

torch's ``DataLoader`` will not do: its workers need /dev/shm, of which Docker gives 64 MB, and a file descriptor per tensor. If
one of these runs out, a batch is lost and the main process waits for it forever.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from data.batch import AnchorBatch, PairBatch
from utils.parallel import WorkerFailed, in_order

Item = TypeVar("Item", PairBatch, AnchorBatch)


@dataclass(frozen=True)
class Loader:
    """Loader settings: number of worker processes (0: the main process), and whether to pin memory for the copy to a GPU."""

    device: torch.device
    workers: int = 0
    pin: bool = False

    def __call__(self, dataset: Dataset[Item], indices: Sequence[int] | None = None) -> Generator[Item, None, None]:
        """Yield the batches with these ``indices``, all by default, on the device.

        Raises the dataset's ``InputError``, and ``WorkerFailed`` if the machine is to blame.
        """
        order: Sequence[int] = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
        items: Iterator[Item] = (self._pinned(_read(dataset, index)) for index in order)
        if self.workers:
            how: dict[str, Any] = {"finish": self._decoded, "method": "fork", "option": "--n_workers, or 0"}
            items = in_order(partial(_encoded, dataset), order, self.workers, ahead=2, **how)
        for item in items:
            yield item.to(self.device)

    def _decoded(self, encoded: tuple[bytes, list[Any]]) -> Any:
        return self._pinned(pickle.loads(encoded[0], buffers=encoded[1]))

    def _pinned(self, item: Item) -> Item:
        if not (self.pin and self.device.type == "cuda"):
            return item
        with torch.cuda.device(self.device):  # each thread starts with the first one
            return item.pin_memory()


def _read(dataset: Dataset[Item], index: int) -> Item:
    try:
        return dataset[index]
    except (OSError, MemoryError) as error:
        raise WorkerFailed(f"cannot read a batch ({str(error) or 'memory ran out'})") from error


def _encoded(dataset: Dataset[Item], index: int) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Read a batch and pickle it, the contents of its tensors apart."""
    torch.set_num_threads(1)  # those of the parent do not survive a fork
    head, buffers = io.BytesIO(), []  # type: ignore[var-annotated]
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(_read(dataset, index))
    return head.getvalue(), buffers


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented

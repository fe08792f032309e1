"""data/loader.py: failures of the machine, and generators that are abandoned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from typing import Any

import pytest
import torch

from data.loader import Loader
from tests.conftest import CPU
from utils.parallel import WorkerFailed


class Unreadable(list[Any]):
    def __getitem__(self, index: object) -> Any:
        raise self.pop()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("error", "named"), [(MemoryError(), "memory ran out"), (OSError("no disk"), "no disk")])
def test_what_the_machine_lacks_is_named(workers: int, error: Exception, named: str) -> None:
    with pytest.raises(WorkerFailed, match=rf"^cannot read a batch \({named}\)$"):
        next(Loader(CPU, workers)(Unreadable([error])))


def test_an_abandoned_generator_leaves_nothing() -> None:
    def resources() -> tuple[int, int, int]:
        return len(multiprocessing.active_children()), threading.active_count(), len(os.listdir("/proc/self/fd"))

    gc.collect()  # what earlier tests left
    before = resources()
    for taken in (1, 5):
        batches: Any = Loader(CPU, 2)([torch.full((3,), index) for index in range(20)])  # type: ignore[arg-type, type-var]
        assert [next(batches)[0].item() for _ in range(taken)] == list(range(taken))
        assert resources() > before
        del batches
        assert resources() == before

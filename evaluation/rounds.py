"""Evaluation shared out among workers: each does every N-th piece, worker 0 gets the results, and nobody else holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from data.batch import PairBatch
from data.loader import Loader
from utils.distributed import ProcessGroup


def shared_out(
    group: ProcessGroup,
    loader: Loader,
    task: Dataset[PairBatch],
    numbers: Sequence[int],
    work: Callable[[int, PairBatch], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Do ``work(number, task[number])`` for all ``numbers``; yields (number, result) in their order, on worker 0 alone.

    What is computed for a number does not depend on how many workers there are. Every worker has to exhaust the iterator.

    Raises:
        InputError: as the task and the work do.
        RankLost: another worker has gone.
    """
    batches = loader(task, numbers[group.rank :: group.world_size])
    for first in range(0, len(numbers), group.world_size):
        of_this_round = numbers[first : first + group.world_size]
        mine = None
        if group.rank < len(of_this_round):
            mine = work(of_this_round[group.rank], next(batches))
        yield from zip(of_this_round, group.gather(mine), strict=False)  # the last round may be short, the others' lists empty

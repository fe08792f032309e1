"""utils/parallel.py: results in order, few items ahead, errors and killed workers reported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from utils.errors import InputError
from utils.parallel import WorkerFailed, in_order


def double(number: int) -> int:
    if number < 0:
        raise InputError(f"{number} is negative")
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


class StrangeError(Exception):
    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"{number} {problem}")


def strange(number: int) -> object:
    if number:
        raise StrangeError(number, "is strange")
    return lambda: 0


def stall_and_die(number: int) -> None:
    time.sleep(number)
    os.kill(os.getpid(), signal.SIGKILL if number else signal.SIGSTOP)


def test_results_are_in_order_and_workers_do_not_run_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 41):
            yield 100 + taken

    results = []
    for result in in_order(double, items(), 2):
        results.append(result)
        assert taken - len(results) <= 8
    assert results == [2 * (100 + number) for number in range(1, 41)]


def test_errors_of_workers_arrive() -> None:
    assert list(in_order(double, [1, 2], 1)) == [2, 4]
    for items, message in (([1, -1, 2], "-1 is negative"), ([*range(33)], "^a worker was killed")):
        with pytest.raises(InputError, match=message):
            list(in_order(double, items, 2))
    with pytest.raises(AttributeError):  # a function that cannot be pickled
        list(in_order(lambda item: item, [1], 2))
    for number, error, message in ((0, AttributeError, "pickle"), (1, RuntimeError, "StrangeError: 1 is strange")):
        with pytest.raises(error, match=message):
            list(in_order(strange, [number], 1, method="fork"))


def test_a_killed_worker_beside_a_stalled_one() -> None:
    with pytest.raises(WorkerFailed, match=r"killed.*; try a lower --nproc$"):
        list(in_order(stall_and_die, [0, 1], 2, method="fork"))


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_killed_worker_never_hangs(size: int) -> None:
    """Killed at any moment, in the middle of a long result too."""
    for moment in range(8):
        results = in_order(bytes, [size] * 60, 2)
        next(results)
        worker = multiprocessing.active_children()[moment % 2]
        threading.Timer(0.002 * moment, worker.kill).start()
        with pytest.raises(InputError, match="a worker was killed"):  # noqa: PT012
            for _ in results:
                time.sleep(0.001)
        assert not multiprocessing.active_children()

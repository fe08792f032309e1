"""scripts/parallel.py: results in order, work never far ahead, a killed worker named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from utils.errors import InputError
from utils.parallel import in_order


def double(number: int) -> int:
    if number < 0:
        raise InputError(f"{number} is negative")
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_workers_do_not_run_ahead() -> None:
    asked = 0

    def items() -> Iterator[int]:
        nonlocal asked
        for number in range(100, 140):
            asked += 1
            yield number

    results = []
    for result in in_order(double, items(), 2):
        results.append(result)
        assert asked - len(results) <= 8
    assert results == [2 * number for number in range(100, 140)]


def test_what_goes_wrong_in_a_worker_arrives() -> None:
    assert list(in_order(double, [1, 2], 1)) == [2, 4]
    with pytest.raises(InputError, match="-1 is negative"):
        list(in_order(double, [1, -1, 2], 2))
    with pytest.raises(InputError, match="--nproc: a worker was killed"):
        list(in_order(double, [*range(13), 13, *range(20)], 2))
    with pytest.raises(AttributeError):  # what cannot be sent
        list(in_order(lambda item: item, [1], 2))


def take_slowly(results: Iterator[bytes]) -> None:
    for _ in results:
        time.sleep(0.001)


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_killed_worker_never_hangs(size: int) -> None:
    """Killed at any moment, in the midst of a long message too."""
    for moment in range(8):
        results = in_order(bytes, [size] * 60, 2)
        next(results)
        worker = multiprocessing.active_children()[moment % 2]
        threading.Timer(0.002 * moment, worker.kill).start()
        with pytest.raises(InputError, match="a worker was killed"):
            take_slowly(results)
        assert not multiprocessing.active_children()

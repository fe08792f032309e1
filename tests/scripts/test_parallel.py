"""scripts/parallel.py: results in order, work never far ahead, a killed worker named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from scripts.parallel import in_order
from utils.errors import InputError


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
    with pytest.raises(InputError, match="--nproc 2: a worker was killed"):
        list(in_order(double, [13], 2))

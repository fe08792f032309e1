"""Some damaged inputs for every reader; ``python -m tests.fuzz.run`` tries thousands (see docs/robustness.md)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fuzz.campaign import TARGETS, run
from tests.fuzz.sandbox import Sandbox

INPUTS = 150


@pytest.mark.parametrize("group", TARGETS)
def test_damaged_inputs_end_as_a_result_or_as_the_documented_error(group: str, tmp_path: Path) -> None:
    for target in TARGETS[group](tmp_path):
        tally = run(target, INPUTS)
        assert not tally.findings, target.name
        assert tally.kinds["error"], target.name


def _misbehave(data: bytes) -> None:
    """Do what ``data`` says, as a reader must not."""
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif data == b"hang":
        time.sleep(60)
    elif data == b"fill":
        bytearray(1 << 30)
    elif data == b"long":
        raise ValueError("x" * 100_000)
    elif data:
        raise KeyError(data)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"crash", "died of SIGSEGV"),
        (b"hang", "took over 0.2 seconds"),
        (b"fill", "MemoryError"),
        (b"long", "a message of 100000 characters"),
        (b"other", "KeyError"),
    ],
)
def test_what_must_not_happen_is_found(data: bytes, detail: str) -> None:
    with Sandbox(_misbehave, (ValueError,), 64 << 20, 0.2, b"") as sandbox:
        for _ in range(2):
            outcome = sandbox.run(data)
            assert outcome.kind == "finding"
            assert detail in outcome.detail
        assert sandbox.run(b"").kind == "result"

"""Signals: when they take effect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch import ROOT
from utils import signals as module
from utils.errors import Interrupted
from utils.signals import Stop


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_once_or_deferred(number: int) -> None:
    before = signal.getsignal(number)
    with Stop() as stop, pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.number == number
    reached = []
    with Stop() as stop:

        def work() -> None:
            with stop.deferred():
                send(number)
                reached.append("the end of the block")
            reached.append("what comes after it")

        with pytest.raises(Interrupted):
            work()
        with pytest.raises(Interrupted):
            stop.check()
    assert reached == ["the end of the block"]
    assert signal.getsignal(number) is before


def test_an_error_that_the_signal_caused_counts_as_the_signal() -> None:
    def fail(stop: Stop, number: int | None) -> None:
        with stop.deferred():
            if number is not None:
                send(number)
            raise RuntimeError("a reading process has gone")

    with Stop() as stop, pytest.raises(Interrupted):
        fail(stop, signal.SIGTERM)
    with Stop() as stop, pytest.raises(RuntimeError, match="has gone"):
        fail(stop, None)


def test_only_a_later_ctrl_c_interrupts_what_is_done_because_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def work(stop: Stop) -> None:
        with stop.deferred():
            send(signal.SIGINT)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            reached.append("saving")
            monkeypatch.setattr(module, "SAME_KEY", 0.0)
            time.sleep(0.01)
            send(signal.SIGINT)
            reached.append("saved")

    with Stop() as stop, pytest.raises(KeyboardInterrupt) as caught:
        work(stop)
    assert not isinstance(caught.value, Interrupted)
    assert reached == ["saving"]


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    program = "import os, signal; from utils.signals import Stop\nwith Stop(): os.kill(os.getpid(), signal.SIGINT); print(1)"
    script = f"trap '' INT; exec {sys.executable} -c '{program}'"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"

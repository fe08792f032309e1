"""Signals: when they take effect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import ROOT
from utils import signals
from utils.errors import Interrupted
from utils.signals import StopSignal


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_once_or_deferred(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal(), pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.number == number
    reached = []

    def work(stop: StopSignal) -> None:
        with stop.deferred():
            send(number)
            reached.append("end of the block")
        reached.append("after the block")

    with StopSignal() as stop:
        for raises in (lambda: work(stop), stop.check):
            with pytest.raises(Interrupted):
                raises()
    assert reached == ["end of the block"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Interrupted), (None, RuntimeError)])
def test_an_error_caused_by_the_signal_counts_as_the_signal(number: int | None, raised: type[BaseException]) -> None:
    def fail(stop: StopSignal) -> None:
        with stop.deferred():
            if number is not None:
                send(number)
            raise RuntimeError("a DataLoader worker has died")

    with StopSignal() as stop, pytest.raises(raised):
        fail(stop)


def test_only_a_later_ctrl_c_interrupts_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def work(stop: StopSignal) -> None:
        with stop.deferred():
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                send(number)
            reached.append("saving")
            monkeypatch.setattr(signals, "SAME_KEY", 0.0)
            time.sleep(0.01)
            send(signal.SIGINT)
            reached.append("saved")

    with StopSignal() as stop, pytest.raises(KeyboardInterrupt) as caught:
        work(stop)
    assert not isinstance(caught.value, Interrupted)
    assert reached == ["saving"]


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    code = "import os; from utils.signals import StopSignal\nwith StopSignal(): os.kill(os.getpid(), 2); print(1)"
    script = f"trap '' INT; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"

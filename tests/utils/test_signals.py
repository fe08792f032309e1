"""Signals: when they take effect."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from signal import SIGHUP, SIGINT, SIGTERM, raise_signal

import pytest

from scripts import report, search, visualize
from tests.conftest import BUNDLED
from tests.processes import ROOT
from utils import signals
from utils.errors import Interrupted
from utils.signals import StopSignal

AT_TORCH = """
import builtins, runpy, signal, sys
original = builtins.__import__
builtins.__import__ = lambda name, *rest: (name == "torch" and signal.raise_signal(2), original(name, *rest))[1]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


ENDED = """
import atexit, os, sys
from utils.startup import one_line_errors
from utils.errors import InputError
@one_line_errors
def main(error):
    if error:
        raise InputError(error)
atexit.register(os.kill, os.getpid(), 2)
main(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handler = signal.getsignal(SIGINT)
    yield
    signal.signal(SIGINT, handler)


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP])
def test_at_once_or_deferred(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal(), pytest.raises(Interrupted) as caught:
        raise_signal(number)
    assert caught.value.number == number
    reached = []
    with StopSignal() as stop:
        with pytest.raises(Interrupted), stop.deferred():  # noqa: PT012
            raise_signal(number)
            reached.append("end of the block")
        with pytest.raises(Interrupted), stop.deferred(), stop.at_once():
            reached.append("a wait")
    assert reached == ["end of the block"]
    assert (signal.getsignal(number) is before) == (number != SIGINT)  # the clean-up goes on


@pytest.mark.parametrize(("numbers", "raised"), [([SIGTERM], Interrupted), ([], RuntimeError)])
def test_an_error_caused_by_the_signal_counts_as_the_signal(numbers: list[int], raised: type[BaseException]) -> None:
    with StopSignal() as stop, pytest.raises(raised), stop.deferred():  # noqa: PT012
        for number in numbers:
            raise_signal(number)
        raise RuntimeError("another rank has died")


def test_only_a_later_ctrl_c_interrupts_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt) as caught, stop.deferred():  # noqa: PT012
        for number in (SIGINT, SIGINT, SIGTERM):
            raise_signal(number)
        reached.append("saving")
        monkeypatch.setattr(signals, "SAME_KEY", 0.0)
        time.sleep(0.01)
        raise_signal(SIGINT)
        reached.append("saved")
    assert not isinstance(caught.value, Interrupted)
    assert reached == ["saving"]


@pytest.mark.parametrize("program", ["inf_itm.py", "scripts/search.py"])
def test_ctrl_c_during_the_imports(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_TORCH, program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(("error", "code", "lines"), [("", 0, ""), ("wrong", 2, "error: wrong\n")])
def test_ctrl_c_after_the_end(error: str, code: int, lines: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDED, error], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, lines)


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    code = "import os; from utils.signals import StopSignal\nwith StopSignal(): os.kill(os.getpid(), 2); print(1)"
    script = f"trap '' INT; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("main", "step", "words"),
    [
        (report.main, "write_report", ["run", "--output", "page"]),
        (visualize.main, "read_scalars", ["run", "run", "--output", "a.png"]),
        (search.main, "Retriever.from_options", [BUNDLED.image_db, "a dog", "--checkpoint", "a", "--model_config", "a"]),
    ],
    ids=["report", "visualize", "search"],
)
def test_programs_say_which_signal_ended_them(
    main: Callable[..., None], step: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{main.__module__}.{step}", lambda *_: raise_signal(SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        main(list(map(str, words)))
    assert "interrupted by SIGTERM" in capsys.readouterr().err


def test_a_signal_to_another_thread_waits_for_the_end_of_the_block() -> None:
    """Python runs its handler in the main thread, whatever signals that one blocks."""
    reached = []
    with StopSignal(), ThreadPoolExecutor(1) as thread:
        thread.submit(time.sleep, 0).result()  # it starts before the block, whose mask it would inherit
        with pytest.raises(Interrupted), signals.blocked():  # noqa: PT012
            thread.submit(raise_signal, SIGTERM).result()
            time.sleep(0.01)
            reached.append("end of the block")
    assert reached == ["end of the block"]

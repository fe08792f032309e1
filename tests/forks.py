"""Starts programs in forks of a process that has imported what they need, since importing torch takes seconds each time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SERVER = multiprocessing.get_context("forkserver")  # it has no threads, and has not run torch's autograd, which forbids forks
_SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "train_itm_hard_negatives", "inf_itm"])


class Forked:
    """``python -m module arguments`` as far as anyone can tell: used like a ``subprocess.Popen`` of text with one pipe.

    Args:
        environment: the variables that it has.
        prepare: is called in it first.
    """

    def __init__(
        self,
        module: str,
        *arguments: str | Path,
        environment: Mapping[str, str] = os.environ,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.args = [module, *map(str, arguments)]
        self._pipe, theirs = _SERVER.Pipe(duplex=False)
        self._process = _SERVER.Process(target=_become, args=(theirs, self.args, dict(environment), prepare))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        """As ``subprocess`` has it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self) -> None:
        """Until it has ended."""
        self._process.join()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it and what it started have printed, once they have ended. Raises ``subprocess.TimeoutExpired``."""
        until, output = time.monotonic() + timeout, b""
        while select.select([self._pipe], [], [], max(until - time.monotonic(), 0))[0]:
            if not (data := os.read(self._pipe.fileno(), 1 << 16)):
                self._process.join(max(until - time.monotonic(), 0))
                return output.decode(), None
            output += data
        raise subprocess.TimeoutExpired(self.args, timeout)


def _become(pipe: Connection, args: list[str], environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    """Be the program, from a session of its own to what an interpreter does at the end."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # its own children are to be started as usual
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in (1, 2):
        os.dup2(pipe.fileno(), descriptor)
    pipe.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - those of the server are set up for where it prints to
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = args[1:]
    code: object = 0
    try:
        if prepare:
            prepare()
        sys.modules.pop(args[0], None)
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))

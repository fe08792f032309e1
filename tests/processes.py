"""Start programs as users do, in one process or on several ranks, wait for them, and kill them at chosen moments."""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
_MISSING = importlib.util.find_spec("horovod") is None
HOROVOD = pytest.mark.skipif(_MISSING, reason="horovod is not installed: scripts/install_horovod.sh")
LAUNCHERS = [pytest.param("horovodrun", marks=HOROVOD), "torchrun"]
_FREE_PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # another test run may hold the default one
_SERVER = multiprocessing.get_context("forkserver")  # runs neither threads nor autograd, which forbid forks
_SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "train_itm_hard_negatives", "inf_itm"])
Prepare = Callable[[], object]


class Forked:
    """``python -m module arguments``, forked from a server that has imported torch, which takes seconds.

    Used like a ``subprocess.Popen``; ``prepare`` is called in the new process first.
    """

    def __init__(
        self, module: str, *arguments: str | Path, environment: Mapping[str, str] = ENVIRONMENT, prepare: Prepare = bool
    ) -> None:
        self.args = [module, *map(str, arguments)]
        self._output = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - deleted with this object
        self._process = _SERVER.Process(target=_become, args=(self._output.name, self.args, dict(environment), prepare))
        self._process.start()
        self.pid = self._process.pid or 0
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        """Return the exit code, or None if the process is running."""
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for the end, and return all output and errors. Raises ``subprocess.TimeoutExpired``."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._output.read(), None


def _become(output: str, args: list[str], environment: dict[str, str], prepare: Prepare) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the default, instead of the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = args[1:]
    sys.modules.pop(args[0], None)
    try:
        prepare()
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


Process = subprocess.Popen[str] | Forked


def start(launcher: str, ranks: int, *words: str | Path) -> Process:
    """Start a command on ``ranks`` ranks, or with launcher "" in one process; output and errors come together."""
    command = list(map(str, words))
    if launcher == "torchrun":
        torchrun = *_FREE_PORT, "--nnodes", "1", "--nproc_per_node", str(ranks), "--no-python"
        return Forked("torch.distributed.run", *torchrun, *command)
    if launcher:
        command = [launcher, "-np", str(ranks), *command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def finish(process: Process, seconds: float, code: int | None = None) -> str:
    """Return the output of a process that must end within ``seconds``, with exit code ``code`` if given.

    Otherwise fail the test; a process that has not ended is killed with all that it started.
    """
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{process.args} has not ended after {seconds} s: {process.communicate(timeout=10)[0]}")
    assert code in (None, process.returncode), output
    return output


def run(launcher: str, ranks: int, *words: str | Path, seconds: float = 200) -> str:
    """Return the output of a command that must succeed."""
    return finish(start(launcher, ranks, *words), seconds, code=0)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def die_at_call(function: str, number: int, wanted: str = "", delay: float = 0) -> None:
    """Make call ``number`` of a function kill this process by SIGKILL, ``delay`` seconds later.

    ``function`` is a dotted name. Only calls count whose last argument has ``wanted`` in its text.
    """
    holder, _, name = function.rpartition(".")
    original, calls = getattr(pkgutil.resolve_name(holder), name), count(1)
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if (not wanted or wanted in str(args[-1])) and next(calls) == number:
            threading.Timer(delay, kill).start() if delay else kill()
        return original(*args, **kwargs)

    setattr(pkgutil.resolve_name(holder), name, counted)

"""Starts programs on several workers, as users do."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import ROOT, Forked

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
HOROVOD = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="horovod is not installed: scripts/install_horovod.sh"
)
LAUNCHERS = [pytest.param("horovodrun", marks=HOROVOD), "torchrun"]
FREE_PORT = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # another test run may hold the default one
Process = subprocess.Popen[str] | Forked


def command(launcher: str, workers: int, *words: str | Path) -> list[str]:
    """The command line that starts ``words`` on so many workers; with launcher "" in one process."""
    prefix = {
        "": [],
        "horovodrun": ["horovodrun", "-np", str(workers)],
        "torchrun": ["torchrun", *FREE_PORT, "--nnodes", "1", "--nproc_per_node", str(workers), "--no-python"],
    }[launcher]
    return [*prefix, *map(str, words)]


def start(launcher: str, workers: int, *words: str | Path) -> Process:
    """Start ``command``; errors and output come through one pipe. It heeds Ctrl-C even where the shell ignores it."""
    whole = command(launcher, workers, *words)
    if launcher == "torchrun":  # the workers are processes of their own, which it starts
        return Forked("torch.distributed.run", *whole[1:], environment=ENVIRONMENT)
    return subprocess.Popen(
        whole,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def free_port() -> int:
    """One that nobody holds."""
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def finish(process: Process, seconds: float) -> str:
    """Its output, once it has ended; what does not end in time is killed with all it started, and fails the test."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{process.args} has not ended after {seconds} s")


def run(launcher: str, workers: int, *words: str | Path, seconds: float = 200) -> str:
    """The output of a command that must succeed."""
    process = start(launcher, workers, *words)
    output = finish(process, seconds)
    assert process.returncode == 0, output
    return output

"""The log of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT


def test_a_full_disk_for_the_logs(tmp_path: Path) -> None:
    program = (
        "import pathlib, resource, sys; from utils.run_log import RunLog; log = RunLog(pathlib.Path(sys.argv[1]));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "[log.scalars({'loss': 1.0}, update) for update in range(1000)]"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert f"{tmp_path}: TensorBoard's events cannot be written (File too large)" in done.stderr

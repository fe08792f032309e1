"""What a result depends on besides its options: the commit of the program and the software of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from utils.errors import counted
from utils.files import atomic_file, save_json

ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, Any]:
    """Return commit, versions and machine as JSON values."""
    import torch  # takes a second, which the converters save

    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if (changes := _git("status", "--porcelain")) is None else changes.splitlines(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'CPU')}, {counted(torch.get_num_threads(), 'thread')}",
    }


def made_by(program: str) -> dict[str, Any]:
    """Return the program that makes a database and its commit, with "-dirty" if there are uncommitted changes."""
    return {
        "program": str(Path(program).resolve().relative_to(ROOT)),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    }


def save_git_state(folder: Path) -> None:
    """Write ``git.json``, and uncommitted changes as ``git.diff``."""
    save_json(folder / "git.json", {"branch": _git("branch", "--show-current"), **provenance()})
    if diff := _git("diff", "HEAD"):
        with atomic_file(folder / "git.diff") as file:
            file.write(f"{diff}\n".encode())


def _git(*command: str) -> str | None:
    """Return the output of git, or None without git or outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace").rstrip("\n")

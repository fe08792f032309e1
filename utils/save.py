"""Write files so that a reader sees the old one or the new one, whole; and what a run folder records of its origin."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def new_folder(path: str | Path) -> Path:
    """Make folder ``path``. Raises ``InputError`` when it exists and is not empty, or cannot be made."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(folder.iterdir(), None)
    except OSError as error:
        raise InputError(f"output_dir {folder}: cannot be made or read ({error.strerror})") from error
    if occupied is not None:
        raise InputError(f"output_dir {folder}: not empty (it holds {occupied.name}), expected a new or empty folder")
    return folder


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def save_npz(path: str | Path, **arrays: np.ndarray) -> None:
    """Write arrays as ``.npz``, atomically."""
    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_weights(path: str | Path, model: torch.nn.Module) -> None:
    """Write a state dict on the CPU, atomically; the names are those of published checkpoints."""
    with replacing(path) as file:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, file)


def sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """The program's commit and the machine's software: what else a result depends on."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
    }


def save_git_state(folder: Path) -> None:
    """Write ``git.json``, and the uncommitted changes as ``git.diff`` where there are any."""
    save_json(folder / "git.json", {"branch": _git("branch", "--show-current"), **provenance()})
    if diff := _git("diff", "HEAD", strip=False):
        with replacing(folder / "git.diff") as file:
            file.write(diff.encode())


def _git(*command: str, strip: bool = True) -> str | None:
    """What git prints, or None without git or outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    text = done.stdout.decode(errors="replace")
    return text.strip() if strip else text

"""Stand-ins for programs that a test cannot have, and scripts run as users run them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = {canonicalize_name(k): v for k, v in re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text())}
PIP = metadata.distribution("pip")
SETTINGS = {
    "CUDA_VISIBLE_DEVICES", "IAIS_IMAGE", "IAIS_BUTD_IMAGE", "PIP_CONSTRAINT", "CXX", "HOROVOD_CUDA_HOME", "HOROVOD_NCCL_HOME",
    "BASH_ENV",
}  # fmt: skip


def environment(**changes: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {name: str(value) for name, value in changes.items()}


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(*command: object, cwd: Path = ROOT, **changes: object) -> subprocess.CompletedProcess[str]:
    """Without a terminal; the test reads the exit code."""
    words = list(map(str, command))
    return subprocess.run(
        words, cwd=cwd, env=environment(**changes), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def says(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """Whether it ended with the exit code, and with one line that holds the message."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def path_without(folder: Path, path: str, *names: str) -> str:
    """Fill a folder with links to all programs in a PATH except those with these names; return it."""
    folder.mkdir()
    for program in (file for source in map(Path, path.split(":")) if source.is_dir() for file in source.iterdir()):
        if not any(fnmatch.fnmatch(program.name, name) for name in names) and not (folder / program.name).is_symlink():
            (folder / program.name).symlink_to(program)
    return str(folder)


def copy_pip(folder: Path) -> None:
    """Install the tests' own pip."""
    for name in ("pip", f"pip-{PIP.version}.dist-info"):
        shutil.copytree(str(PIP.locate_file(name)), folder / name, ignore=shutil.ignore_patterns("__pycache__"))


class Docker:
    """A ``docker`` that writes down how it was called; RUNTIMES, INFO, IMAGE, INSIDE and CODE in its environment guide it."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record.json"
        self.bin = folder / "bin"
        executable(
            self.bin / "docker",
            f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "info":
    print(os.environ.get("RUNTIMES", "io.containerd.runc.v2 nvidia runc "))
    sys.exit(int(os.environ.get("INFO", "0")))
if sys.argv[1:3] == ["image", "inspect"]:
    sys.exit(sys.argv[3] != os.environ.get("IMAGE", "iais"))
if os.environ.get("INSIDE"):
    os.system(os.environ["INSIDE"])
with open({str(self.record)!r}, "w") as record:
    json.dump(sys.argv[1:], record)
print("from inside")
sys.exit(int(os.environ.get("CODE", "0")))
""",
        )

    @property
    def path(self) -> str:
        return f"{self.bin}:{os.environ['PATH']}"

    def recorded(self) -> list[str]:
        recorded: list[str] = json.loads(self.record.read_text())
        return recorded

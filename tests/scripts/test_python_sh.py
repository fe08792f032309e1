"""scripts/python.sh: which interpreter it runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

NONE = r"error: no Python 3\.10 or newer \(tried .*python3\); install one or set PYTHON=<its path>\n"


def interpreter(path: Path, is_new: bool = True) -> Path:
    """Create a program that prints its path and arguments, and claims to be Python 3.10 if ``is_new``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) {str(is_new).lower()};; *) echo "$0" "$3";; esac\n')
    path.chmod(0o755)
    return path


def test_the_interpreter(tmp_path: Path) -> None:
    tools, copy = tmp_path / "tools", tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/python.sh", copy / "scripts")
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")

    def run(code: int = 0, **environment: str) -> str:
        words = [shutil.which("bash") or "", copy / "scripts/python.sh", "-c", "import sys; print(sys.argv)", "a b"]
        done = subprocess.run(words, env={"PATH": str(tools), **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == code
        return done.stderr if code else done.stdout

    assert re.fullmatch(NONE, run(2))
    old = interpreter(tools / "python3", is_new=False)
    assert re.fullmatch(NONE, run(2))
    new = interpreter(tools / "python3.11")
    interpreter(tools / "python3.10")
    assert run() == f"{new} a b\n"
    interpreter(copy / ".venv/bin/python")
    assert run() == f"{copy}/scripts/../.venv/bin/python a b\n"
    assert run(PYTHON=sys.executable) == "['-c', 'a b']\n"
    assert run(2, PYTHON=str(old)).count("\n") == 1

"""scripts/python.sh: which interpreter it runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT


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

    def interpreter(path: Path, version: int) -> str:
        """Create a program that prints its path and arguments, and takes itself for Python 3.``version``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        check = f'[ "$2" != "import sys; sys.exit(sys.version_info < (3, 10))" ] || exit {int(version < 10)}'
        path.write_text(f'#!/bin/sh\n{check}\necho "$0" "$3"\n')
        path.chmod(0o755)
        return str(path)

    message = r"error: no Python 3\.10 or newer \(tried .*python3\); install one or set PYTHON=<path of one>\n"
    assert re.fullmatch(message, run(2))
    old = interpreter(tools / "python3", 9)
    assert re.fullmatch(message, run(2))
    newest = interpreter(tools / "python3.11", 11)
    interpreter(tools / "python3.10", 10)
    assert run() == f"{newest} a b\n"
    interpreter(copy / ".venv/bin/python", 10)
    assert run() == f"{copy}/scripts/../.venv/bin/python a b\n"
    assert run(PYTHON=sys.executable) == "['-c', 'a b']\n"
    assert run(2, PYTHON=old).count("\n") == 1

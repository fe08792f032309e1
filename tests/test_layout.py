"""Rules of the tree: every module imports without a GPU, horovod or apex, and knows only what it may."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("config", "data", "evaluation", "model", "optim", "scripts", "utils")
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for name in PACKAGES for path in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize("module", [*MODULES, "train_itm_hard_negatives", "inf_itm"])
def test_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_mixed_precision_is_in_one_module() -> None:
    users = {m for m in MODULES if re.search(r"\bautocast\(|GradScaler", (ROOT / f"{m.replace('.', '/')}.py").read_text())}
    assert users <= {"utils.precision", "model.retrieval"}
    assert "torch.autocast" not in (ROOT / "model/retrieval.py").read_text()


def test_no_file_is_long() -> None:
    long = {m: n for m in MODULES if (n := (ROOT / f"{m.replace('.', '/')}.py").read_text().count("\n")) > 320}
    assert not long


PROGRAMS = (
    *("create_txtdb", "convert_imgdir", "inspect_db", "download_itm", "make_scenes", "demo"),
    *("report", "visualize", "search", "eval_isda", "eval_winoground", "ablate"),
)


@pytest.mark.parametrize("program", ["train_itm_hard_negatives", "inf_itm", *(f"scripts.{name}" for name in PROGRAMS)])
def test_help(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main(["--help"])
    assert not ended.value.code
    assert "--" in capsys.readouterr().out

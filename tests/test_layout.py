"""Rules of the tree: what may import what, how long files are, and that every module imports and every program has help."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.standins import run, says

LAYERS = {"utils": 0, "data": 1, "model": 2, "optim": 3, "evaluation": 3}  # a package imports itself and lower layers
PACKAGES = (*LAYERS, "scripts", "examples", "benchmarks", "tests")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
}
MODULES = sorted(name for name in FILES if name.split(".")[0] not in ("tests", "benchmarks"))
PROGRAMS = [name for name in MODULES if "def main(" in FILES[name].read_text() and re.match(r"scripts\.|\w+$", name)]
OURS = {name.split(".")[0] for name in FILES}


def imports(name: str) -> set[str]:
    """The modules that a module imports: anywhere, in functions and for type checkers as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_import_runs_upwards() -> None:
    for name in MODULES:
        package = name.split(".")[0]
        if package in LAYERS:
            lower = {other for other in LAYERS if LAYERS[other] < LAYERS[package]}
            used = {module for module in imports(name) if module.split(".")[0] in OURS - lower - {package}}
            assert not used, f"{name} imports {used}"


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        (r"(from|import) horovod|import_module\(.horovod", "utils.distributed"),
        (r"torch\.distributed", "utils.distributed"),
        (r"torch\.autocast|torch\.amp|GradScaler", "utils.precision"),
    ],
)
def test_one_module_knows(pattern: str, module: str) -> None:
    assert [name for name in MODULES if re.search(pattern, FILES[name].read_text())] == [module]


def test_files_are_short() -> None:
    limits = {"tests": 400, "scripts": 150}
    lengths = {name: path.read_text().count("\n") for name, path in FILES.items()}
    assert not {name: lines for name, lines in lengths.items() if lines > limits.get(name.split(".")[0], 320)}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module: str) -> None:
    """Without a GPU, horovod or apex."""
    importlib.import_module(module)


@pytest.mark.parametrize(
    ("package", "programs"),
    [
        ("torch", ["scripts.convert_imgdir", "scripts.create_txtdb", "scripts.download_itm", "scripts.make_scenes"]),
        ("matplotlib", ["train_itm_hard_negatives", "inf_itm", "scripts.eval_winoground", "scripts.inspect_db"]),
    ],
)
def test_programs_start_without_slow_imports(package: str, programs: list[str]) -> None:
    code = f"import sys, {', '.join(programs)}; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main(["--help"])
    assert not ended.value.code
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("program", [*PROGRAMS, "benchmarks.run", "benchmarks.scaling"])
def test_missing_packages_are_one_line(program: str) -> None:
    done = run(sys.executable, "-S", FILES[program], "--help")
    if program == "scripts.download_itm":  # which runs before anything is installed
        assert done.returncode == 0
    else:
        says(done, 2, "; run 'make venv' in the repository")

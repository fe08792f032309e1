"""Set-up of .venv and of horovod, with stand-ins for interpreters, compilers, packages and indexes. Nothing is built."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.utils import canonicalize_name

from tests.standins import PINS, ROOT, copy_pip, executable, run, says

INSTALL = ROOT / "scripts/install_horovod.sh"
HAS_HEADERS = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
HAS_HOROVOD = importlib.util.find_spec("horovod") is not None
WHEEL = f"pip-{PINS['pip']}-py3-none-any.whl"
# Pinned requirements are what it cannot find.
PIP = """
import pathlib, sys, sysconfig, zipfile
print("pip", *sys.argv[1:], flush=True)
last = pathlib.Path(sys.argv[-1])
if last.suffix == ".whl":
    zipfile.ZipFile(last).extractall(sysconfig.get_path("purelib"))
elif last.is_file() and "==" in last.read_text():
    sys.exit(f"not found: {last.read_text()}")
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What setup_venv.sh needs of the repository, a Python without ensurepip, and an index with a stand-in for pip."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup_venv.sh", tmp_path / "scripts")
    (tmp_path / "constraints.txt").write_text(f"pip=={PINS['pip']}\n")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text("numpy")
    cases = f"-c*) echo '3.11 {tmp_path}/python' ;; '-m venv .venv') exit 1 ;; *) exec '{sys.executable}' \"$@\" ;;"
    executable(tmp_path / "python", f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr("pip/__main__.py", PIP)
    digest = hashlib.sha256((tmp_path / WHEEL).read_bytes()).hexdigest()
    (tmp_path / "index.html").write_text(f'<a href="{WHEEL}#sha256={digest}">pip</a>')
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/index.html#")  # the path that the script appends is not read
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return tmp_path


def test_venv_without_ensurepip(clone: Path) -> None:
    def set_up(level: str, code: int = 0, **changes: object) -> list[str]:
        done = run("bash", clone / "scripts/setup_venv.sh", level, **changes)
        assert done.returncode == code, done.stderr
        return [*done.stderr.splitlines(), *done.stdout.splitlines()]

    making = f"setup: making .venv with Python 3.11 {clone}/python"
    installing = "setup: installing requirements.txt into .venv"
    pip = "pip install --disable-pip-version-check --constraint constraints.txt"
    pips = [f"pip install --quiet --no-index .venv/{WHEEL}", f"{pip} --requirement requirements.txt"]
    (clone / "requirements.txt").write_text("numpy==0")
    assert set_up("run", 1) == [making, installing, "not found: numpy==0", *pips]
    (clone / "requirements.txt").write_text("numpy")
    remaking = f"{making}; the old one is unfinished, broken or of another Python"
    assert set_up("run") == [remaking, installing, *pips]
    assert set_up("run") == []
    assert set_up("dev", TORCH_INDEX_URL="https://torch") == [
        "setup: installing requirements-dev.txt into .venv",
        f"{pip} --no-deps --index-url https://torch torch",
        f"{pip} --requirement requirements-dev.txt",
    ]


def test_set_up_refuses_what_is_missing(clone: Path) -> None:
    script = clone / "scripts/setup_venv.sh"
    says(run("bash", script, "all"), 2, "usage: scripts/setup_venv.sh run|dev")
    says(run("bash", script, "run", PYTHON="none"), 2, "no Python 3.10 or newer with the modules venv and ssl (tried none)")
    (clone / WHEEL).write_bytes(b"something else")
    (clone / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:9/mirror\n")
    for changes, expected in [
        ({}, "does not have the sha256 that the index states"),
        ({"PIP_INDEX_URL": "", "PIP_CONFIG_FILE": clone / "pip.conf"}, "http://127.0.0.1:9/mirror: .*Connection refused"),
    ]:
        done = run("bash", script, "run", **changes)
        assert done.returncode == 2
        assert re.search(rf"^setup: cannot fetch pip: .*{expected}.*; set PIP_INDEX_URL ", done.stderr, re.MULTILINE)


class Environment:
    """A virtual environment with what can be read of torch without importing it, and stand-ins for pip and compilers."""

    def __init__(self, folder: Path, version: str = "2.13.0+cpu", cuda: str | None = None, standard: int = 20) -> None:
        self.folder, self.python = folder, folder / "venv/bin/python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.packages = next((folder / "venv/lib").iterdir()) / "site-packages"
        for name, text in {
            "pip/__main__.py": PIP,
            "torch/version.py": f"__version__ = {version!r}\ncuda = {cuda!r}\n",
            "torch/utils/cpp_extension.py": f"cflags = ['-std=c++{standard}']\n",
        }.items():
            executable(self.packages / name, text)
        for name in ("c++", "g++", "clang++", "make"):
            executable(folder / f"bin/{name}", "#!/bin/sh\nexit ${CODE:-0}\n")

    def install(self, **changes: object) -> subprocess.CompletedProcess[str]:
        folders = {"XDG_CACHE_HOME": self.folder / "cache", "TMPDIR": self.folder}
        return run("bash", INSTALL, self.python, **folders | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"} | changes)

    def is_untouched(self) -> bool:
        return not [*self.packages.glob("horovod*"), *self.folder.glob("cache/**/*.whl"), *self.folder.glob("horovod.*")]


def test_horovod_refuses_what_is_missing(tmp_path: Path) -> None:
    bare = Environment(tmp_path)
    says(run("bash", INSTALL, tmp_path / "none"), 2, f"no Python at {tmp_path}/none")
    says(run("bash", INSTALL, "--help"), 2, "usage: scripts/install_horovod.sh [PYTHON]")
    expected = "no compiler for C++20, which torch 2.13.0+cpu requires" if HAS_HEADERS else "Python.h; install the headers"
    says(bare.install(CODE=1), 3, expected)
    for package in ("pip", "torch"):
        shutil.rmtree(bare.packages / package)
        says(bare.install(), 2, f"{bare.python} has no {package}")
    assert bare.is_untouched()


@pytest.mark.skipif(not HAS_HEADERS, reason="no Python.h")
@pytest.mark.parametrize(
    ("nvcc", "header", "expected"),
    [
        ("12.6", "venv/nvidia/nccl", "with NCCL (CUDA 12.6 in {0}/cuda, NCCL 2.23.4 in {0}/venv/nvidia/nccl)"),
        ("12.8", "cuda", "with NCCL (CUDA 12.8 in {0}/cuda, NCCL 2.23.4 in {0}/cuda)"),
        ("12.8", "unknown", "with Gloo (torch is built for CUDA 12.6, but there is no nccl.h with a libnccl.so"),
        ("13.0", "cuda", "with Gloo (torch is built for CUDA 12.6, but nvcc in {0}/cuda is 13.0; set HOROVOD_CUDA_HOME"),
    ],
)
def test_horovod_uses_gpus_if_torch_can(tmp_path: Path, nvcc: str, header: str, expected: str) -> None:
    """Check what the script says before it builds, which fails since horovod's source is not found."""
    bare = Environment(tmp_path, "2.6.0a0+df5bbc09d1.nv24.12", "12.6", 17)
    executable(tmp_path / "cuda/bin/nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
    nccl = tmp_path / header.replace("venv", str(bare.packages))
    (nccl / "include").mkdir(parents=True)
    (nccl / "include/nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 23\n#define NCCL_PATCH 4\n")
    executable(nccl / "lib/libnccl.so.2", "")
    done = bare.install(HOROVOD_CUDA_HOME=tmp_path / "cuda")
    line = done.stderr.splitlines()[0].replace(str(bare.packages), f"{tmp_path}/venv")
    assert line.startswith("horovod: building 0.28.1 for torch 2.6.0a0+df5bbc09d1.nv24.12 in C++17, ")
    assert expected.format(tmp_path) in line
    assert "not found: horovod==0.28.1 --hash=sha256:92a43f5a94c43907a5" in done.stderr
    log = next(tmp_path.glob("horovod-log.*"))
    assert done.stderr.endswith(f"horovod: could not be fetched or built (above); the whole log is in {log}\n")
    tools, source = re.findall(r"(?m)^pip (?:install|download) (.*)", log.read_text())
    assert tools.endswith(" setuptools packaging cmake")
    assert source.startswith("--require-hashes --no-deps ")
    assert done.returncode == 1
    assert bare.is_untouched()


@pytest.mark.skipif(not HAS_HOROVOD, reason="no horovod (scripts/install_horovod.sh)")
def test_another_environment_gets_horovod_from_the_cache(tmp_path: Path) -> None:
    """A compiler is not required; a damaged horovod is replaced, an intact one left alone."""
    bare = Environment(tmp_path)
    for package in ("torch", "pip"):
        shutil.rmtree(bare.packages / package)
    copy_pip(bare.packages)
    (tmp_path / "others").mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("horovod"):
            (tmp_path / "others" / path.name).symlink_to(path)
    (bare.packages / "others.pth").write_text(f"{tmp_path}/others\n")
    changes = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", ""), "CODE": 1}
    done = bare.install(**changes)
    if done.returncode == 3:
        pytest.skip("no wheel of this recipe in the cache (scripts/install_horovod.sh)")
    assert f"installed 0.28.1 for torch {torch.__version__}, with " in done.stderr.splitlines()[-1]
    library = next((bare.packages / "horovod/torch").glob("mpi_lib_v2*"))
    whole = library.read_bytes()
    library.write_bytes(whole[:1000])
    done, again = bare.install(**changes), bare.install(**changes)
    assert (done.returncode, library.read_bytes() == whole) == (0, True), done.stderr
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_what_horovod_needs_is_pinned() -> None:
    required = {"setuptools", "packaging", "cmake", "pycparser"}  # by its build, and by cffi
    lines = metadata.requires("horovod") or () if HAS_HOROVOD else ()
    required |= {canonicalize_name(re.split(r"[ <>=(]", line)[0]) for line in lines if ";" not in line}
    assert required <= PINS.keys()

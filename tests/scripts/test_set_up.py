"""Set-up: .venv and horovod, with stand-ins for what a test cannot have."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.utils import canonicalize_name

from tests.standins import PINS, PIP, ROOT, copy_pip, executable, path_without, run, says

INSTALL = ROOT / "scripts/install_horovod.sh"


class Clone:
    """What setup_venv.sh needs of the repository, a Python without ensurepip, and the folder of an index that has pip alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder / "clone", folder / "python"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup_venv.sh", self.folder / "scripts")
        (self.folder / "constraints.txt").write_text(f"pip=={PIP.version}\n")
        (self.folder / "requirements.txt").write_text("pip\n")
        (self.folder / "requirements-dev.txt").write_text("-r requirements.txt\n")
        cases = f"-c*) echo '3.11 {self.python}' ;; '-m venv .venv') exit 1 ;; *) exec '{sys.executable}' \"$@\" ;;"
        executable(self.python, f'#!/bin/sh\ncase "$*" in {cases} esac\n')
        copy_pip(folder / "pip")
        wheel = Path(shutil.make_archive(str(folder / "wheel"), "zip", folder / "pip"))
        self.wheel = wheel.rename(folder / f"pip-{PIP.version}-py3-none-any.whl")
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        (folder / "pip/index.html").write_text(f'<a href="../{self.wheel.name}#sha256={digest}">pip</a>')

    def set_up(self, level: str = "run", **changes: object) -> subprocess.CompletedProcess[str]:
        return run("bash", self.folder / "scripts/setup_venv.sh", level, **{"PYTHON": self.python, "PIP_COMPILE": 0} | changes)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clone]:
    clone = Clone(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
        yield clone
        server.shutdown()


def test_venv_without_ensurepip(clone: Clone) -> None:
    (clone.folder / "requirements.txt").write_text("./none\n")
    interrupted = clone.set_up()
    (clone.folder / "requirements.txt").write_text("pip\n")
    complete, again, dev = clone.set_up(), clone.set_up(), clone.set_up("dev")
    making = f"setup: making .venv with Python 3.11 {clone.python}"
    assert (interrupted.returncode, interrupted.stderr.splitlines()[0]) == (1, making)
    assert complete.returncode == 0, complete.stderr
    assert [line for line in complete.stderr.splitlines() if line.startswith("setup: ")] == [
        f"{making}; the old one is unfinished, broken or of another Python",
        "setup: installing requirements.txt into .venv",
    ]
    assert run(clone.folder / ".venv/bin/python", "-m", "pip", "--version").stdout.startswith(f"pip {PIP.version} ")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert dev.stderr.startswith("setup: installing requirements-dev.txt into .venv")


def test_set_up_refuses_what_is_missing(clone: Clone) -> None:
    says(clone.set_up("all"), 2, "usage: scripts/setup_venv.sh run|dev")
    says(clone.set_up(PYTHON="none"), 2, "no Python 3.10 or newer with the modules venv and ssl (tried none)")
    clone.wheel.write_bytes(b"something else")
    (clone.folder / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:9/mirror\n")
    configured = {"PIP_INDEX_URL": "", "PIP_CONFIG_FILE": clone.folder / "pip.conf"}
    for changes, expected in [
        ({}, "does not have the sha256 that the index states"),
        ({"PIP_INDEX_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9: .*Connection refused"),
        (configured, "http://127.0.0.1:9/mirror: .*Connection refused"),
    ]:
        done = clone.set_up(**changes)
        assert done.returncode == 2
        assert re.fullmatch(rf"setup: cannot fetch pip: .*{expected}.*; set PIP_INDEX_URL .*", done.stderr.splitlines()[-1])


class Environment:
    """A virtual environment that contains only what a test puts into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv/bin/python"
        self.packages = next((folder / "venv/lib").iterdir()) / "site-packages"

    def add_torch(self, version: str = "2.13.0+cpu", cuda: str | None = None, standard: int = 20) -> None:
        """Install as much of torch as can be looked at without importing it, and pip."""
        (self.packages / "torch/utils").mkdir(parents=True)
        (self.packages / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        (self.packages / "torch/utils/cpp_extension.py").write_text(f"cflags = ['-std=c++{standard}']\n")
        copy_pip(self.packages)

    def install(self, **changes: object) -> subprocess.CompletedProcess[str]:
        return run("bash", INSTALL, self.python, **{"XDG_CACHE_HOME": self.folder / "cache", "TMPDIR": self.folder} | changes)

    def is_untouched(self) -> bool:
        return not [*self.folder.glob("cache/**/*.whl"), *self.packages.glob("horovod*"), *self.folder.glob("horovod.*")]


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


HAS_HEADERS = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
HAS_COMPILER = HAS_HEADERS and any(map(shutil.which, ("c++", "g++", "clang++")))
HAS_HOROVOD = importlib.util.find_spec("horovod") is not None
COMPILERS = ("c++*", "g++*", "gcc*", "clang*", "cc", "*-linux-gnu-*")
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler or no Python.h")
needs_horovod = pytest.mark.skipif(not HAS_HOROVOD, reason="no horovod (scripts/install_horovod.sh)")
NO_INDEX = {"PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull}


def test_horovod_needs_a_python_with_torch_and_pip(bare: Environment) -> None:
    says(run("bash", INSTALL, bare.folder / "none"), 2, f"no Python at {bare.folder}/none")
    says(run("bash", INSTALL, "--help"), 2, "usage: scripts/install_horovod.sh [PYTHON]")
    says(bare.install(), 2, f"{bare.python} has no torch")
    bare.add_torch()
    shutil.rmtree(bare.packages / "pip")
    says(bare.install(), 2, f"{bare.python} has no pip")
    assert bare.is_untouched()


def test_horovod_needs_a_compiler(bare: Environment) -> None:
    bare.add_torch()
    path = path_without(bare.folder / "programs", os.environ["PATH"], *COMPILERS)
    expected = "no compiler for C++20, which torch 2.13.0+cpu requires" if HAS_HEADERS else "Python.h; install the headers"
    says(bare.install(PATH=path), 3, expected)
    executable(Path(path) / "g++", "#!/bin/sh\necho 'unknown option -std=c++20' >&2\nexit 1\n")
    says(bare.install(PATH=path), 3, expected)
    assert bare.is_untouched()


@needs_compiler
def test_source_that_is_not_horovods_is_refused(bare: Environment) -> None:
    bare.add_torch()
    index = bare.folder / "index"
    index.mkdir()
    for reason in ("setuptools==80.9.0", "DO NOT MATCH THE HASHES"):
        done = bare.install(PIP_FIND_LINKS=index, **NO_INDEX)
        assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
        last = r"horovod: could not be fetched or built \(above\); the whole log is in (.*)\n"
        assert reason in Path(re.findall(last, done.stderr)[0]).read_text()
        for name in ("setuptools", "packaging", "cmake"):
            info = f"{name}-{PINS[name]}.dist-info"
            with zipfile.ZipFile(index / f"{name}-{PINS[name]}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {PINS[name]}\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
        (index / "horovod-0.28.1.tar.gz").write_bytes(b"something else")
    assert bare.is_untouched()


@needs_compiler
@pytest.mark.parametrize(
    ("nvcc", "header", "expected"),
    [
        ("12.6", "torch", "with NCCL (CUDA 12.6 in {cuda}, NCCL 2.23.4 in {packages}/nvidia/nccl)"),
        ("12.8", "system", "with NCCL (CUDA 12.8 in {cuda}, NCCL 2.23.4 in {cuda})"),
        (
            "12.8",
            "none",
            "with Gloo (torch is built for CUDA 12.6, but there is no nccl.h with a libnccl.so; set HOROVOD_NCCL_HOME",
        ),
        ("13.0", "torch", "with Gloo (torch is built for CUDA 12.6, but nvcc in {cuda} is 13.0; set HOROVOD_CUDA_HOME"),
    ],
)
def test_horovod_uses_gpus_if_torch_can(bare: Environment, nvcc: str, header: str, expected: str) -> None:
    """Check what the script says before it builds, which fails since pip finds nothing."""
    bare.add_torch("2.6.0a0+df5bbc09d1.nv24.12", "12.6", 17)
    cuda = bare.folder / "cuda"
    executable(cuda / "bin/nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
    nccl = {"torch": bare.packages / "nvidia/nccl", "system": cuda, "none": bare.folder / "unknown"}[header]
    (nccl / "include").mkdir(parents=True)
    (nccl / "include/nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 23\n#define NCCL_PATCH 4\n")
    executable(nccl / "lib/libnccl.so.2", "")
    done = bare.install(HOROVOD_CUDA_HOME=cuda, PIP_FIND_LINKS="", **NO_INDEX)
    line = done.stderr.splitlines()[0]
    assert line.startswith("horovod: building 0.28.1 for torch 2.6.0a0+df5bbc09d1.nv24.12 in C++17, ")
    assert expected.format(cuda=cuda, packages=bare.packages) in line
    assert done.returncode == 1


@needs_horovod
def test_second_installation_of_horovod_does_nothing() -> None:
    assert run("bash", INSTALL, sys.executable).returncode == 0
    started = time.monotonic()
    done = run("bash", INSTALL, sys.executable)
    assert time.monotonic() - started < 5  # 0.1 on an idle machine; building takes minutes
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_horovod
def test_another_environment_gets_horovod_from_the_cache(bare: Environment) -> None:
    """An environment that has everything except horovod; it gets it again after it was damaged."""
    (bare.folder / "others").mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("horovod"):
            (bare.folder / "others" / path.name).symlink_to(path)
    (bare.packages / "others.pth").write_text(f"{bare.folder}/others\n")
    without_compiler = path_without(bare.folder / "programs", os.environ["PATH"], *COMPILERS)
    changes = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", ""), "PATH": without_compiler}
    done = bare.install(**changes)
    if done.returncode == 3:
        pytest.skip("no wheel of this recipe in the cache (scripts/install_horovod.sh)")
    assert done.returncode == 0, done.stderr
    assert f"installed 0.28.1 for torch {torch.__version__}, with " in done.stderr.splitlines()[-1]
    library = next((bare.packages / "horovod/torch").glob("mpi_lib_v2*"))
    whole = library.read_bytes()
    code = "import horovod, horovod.torch as hvd; hvd.init(); print(horovod.__file__, hvd.size())"
    assert run(bare.python, "-c", code).stdout == f"{bare.packages}/horovod/__init__.py 1\n"

    library.write_bytes(whole[:1000])
    done = bare.install(**changes)
    assert (done.returncode, library.read_bytes() == whole) == (0, True), done.stderr
    done = run(bare.python, "-m", "pip", "uninstall", "--yes", "horovod")
    assert (done.returncode, list(bare.packages.glob("horovod*"))) == (0, []), done.stderr


def test_what_horovod_needs_is_pinned() -> None:
    required = {"setuptools", "packaging", "cmake", "pycparser"}  # by its build, and by cffi
    if HAS_HOROVOD:
        lines = [line for line in metadata.requires("horovod") or () if ";" not in line]
        required |= {canonicalize_name(re.split(r"[ <>=(]", line)[0]) for line in lines}
    assert required <= PINS.keys()

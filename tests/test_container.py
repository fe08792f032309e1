"""The container's start, its Dockerfile and the installation of horovod, with stand-ins for what a test cannot have."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.standins import ROOT, Docker, environment, executable, run, says

LAUNCH = ROOT / "launch_container.sh"
INSTALL = ROOT / "scripts/install_horovod.sh"


# ---- launch_container.sh


class Machine(Docker):
    """Four folders with awkward names, and a ``docker``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.home = folder
        self.folders = [folder / name for name in ("txt db", "img,db", 'out "put"', "pre'trained")]
        for path in self.folders:
            path.mkdir()

    def path_without(self, *names: str) -> str:
        """A PATH of all programs but the ones of these names."""
        folder = self.home / "programs"
        folder.mkdir()
        for source in (self.bin, *map(Path, os.environ["PATH"].split(":"))):
            for program in source.iterdir() if source.is_dir() else ():
                if not any(fnmatch.fnmatch(program.name, name) for name in names) and not (folder / program.name).is_symlink():
                    (folder / program.name).symlink_to(program)
        return str(folder)

    def expected(self, *command: str, gpus: tuple[str, ...] = ("--gpus", "all"), image: str = "iais") -> list[str]:
        text, images, output, pretrained = self.folders
        written = str(output).replace('"', '""')
        return [
            *("run", "--rm", "--init", "--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
            *("--user", f"{os.getuid()}:{os.getgid()}", "--workdir", "/src"),
            *("--mount", f'type=bind,"source={ROOT}",target=/src'),
            *("--mount", f'type=bind,"source={text}",target=/txt,readonly'),
            *("--mount", f'type=bind,"source={images}",target=/img,readonly'),
            *("--mount", f'type=bind,"source={written}",target=/storage'),
            *("--mount", f'type=bind,"source={pretrained}",target=/pretrain,readonly'),
            *(*gpus, image, *command),
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")


COMMAND = ("python", "-c", "print('a  b')", "--IAIS", "", "*")


@pytest.mark.parametrize("start", ["run", "sourced"])
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_docker_is_asked(machine: Machine, shell: str, start: str) -> None:
    needs(shell)
    words = [shell, LAUNCH] if start == "run" else [shell, "-c", f"source '{LAUNCH}' \"$@\"", "shell"]
    relative = [path.name for path in machine.folders]
    done = run(*words, *relative, *COMMAND, cwd=machine.home, PATH=machine.path, CODE=37, CDPATH=machine.home)
    assert (done.returncode, done.stdout, done.stderr) == (37, "from inside\n", "")
    assert machine.recorded() == machine.expected(*COMMAND)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("0", ("--gpus", '"device=0"')),
        ("2, 3", ("--gpus", '"device=2,3"')),
        ("GPU-1a2b", ("--gpus", '"device=GPU-1a2b"')),
        ("", ("--env", "NVIDIA_VISIBLE_DEVICES=void")),
        ("-1", ("--env", "NVIDIA_VISIBLE_DEVICES=void")),
    ],
)
def test_only_the_gpus_that_are_visible_outside(machine: Machine, visible: str, gpus: tuple[str, ...]) -> None:
    done = run("bash", LAUNCH, *machine.folders, "true", PATH=machine.path, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stderr
    assert machine.recorded() == machine.expected("true", gpus=gpus)


def test_another_image(machine: Machine) -> None:
    done = run("bash", LAUNCH, *machine.folders, "true", PATH=machine.path, IAIS_IMAGE="mine:2", IMAGE="mine:2")
    assert done.returncode == 0, done.stderr
    assert machine.recorded() == machine.expected("true", image="mine:2")


@pytest.mark.parametrize("command", [(), ("nvidia-smi",)])
def test_with_a_terminal(machine: Machine, command: tuple[str, ...]) -> None:
    ours, theirs = pty.openpty()
    words = ["bash", str(LAUNCH), *map(str, machine.folders), *command]
    done = subprocess.run(words, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment(PATH=machine.path))
    os.close(theirs)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    gpus = ("--gpus", "all", "--interactive", "--tty")
    assert machine.recorded() == machine.expected(*(command or ["bash"]), gpus=gpus)


def test_each_thing_that_is_missing(machine: Machine) -> None:
    text, images, output, pretrained = machine.folders

    def refused(message: str, *arguments: object, **changes: object) -> None:
        says(run("bash", LAUNCH, *(arguments or (*machine.folders, "true")), **{"PATH": machine.path} | changes), 2, message)
        assert not machine.record.exists()

    refused("usage: launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED", text, images, output)
    refused(f"IMG_DB: no folder '{machine.home}/none'", text, machine.home / "none", output, pretrained, "true")
    refused(f"PRETRAINED: no folder '{machine.bin}/docker'", text, images, output, machine.bin / "docker", "true")
    refused("no terminal for an interactive bash", *machine.folders)
    refused("docker's engine does not answer", INFO=1)
    refused(f"no image 'other'; build it with 'docker build --tag other \"{ROOT}\"'", IAIS_IMAGE="other")
    bare = machine.path_without("docker", "nvidia-*")
    refused("no docker; install it", PATH=bare)
    (Path(bare) / "docker").symlink_to(machine.bin / "docker")
    refused("no NVIDIA container toolkit", PATH=bare, RUNTIMES="runc ")
    assert run("bash", LAUNCH, *machine.folders, "true", PATH=bare, RUNTIMES="runc ", CUDA_VISIBLE_DEVICES="").returncode == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root can write everywhere")
def test_an_output_that_cannot_be_written(machine: Machine) -> None:
    machine.folders[2].chmod(0o555)
    says(run("bash", LAUNCH, *machine.folders, "true", PATH=machine.path), 2, "OUTPUT: ")


# Prints options, functions, aliases, traps and variables, but not those that change by themselves.
STATE = {
    "bash": "set -o; shopt; declare -F; alias; trap; pwd; declare -p"
    " | grep -vE '^declare [^ ]+ (BASH_|EPOCH|FUNCNAME|LINENO|_=|PIPESTATUS|RANDOM|SECONDS|SRANDOM|before|after|code)'",
    "zsh": "setopt; functions; alias; trap; pwd; typeset"
    " | grep -vE '(^| )(EPOCH.*|LINENO|_|[?]|status|pipestatus|RANDOM|SECONDS|TTYIDLE|ZSH_SUBSHELL|before|after|code)='",
}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("arguments", [0, 4], ids=["refused", "started"])
def test_sourcing_leaves_the_shell_as_it_was(machine: Machine, shell: str, arguments: int) -> None:
    needs(shell)
    state = STATE[shell]
    script = f"""
before=; after=; code=
before=$({state})
source '{LAUNCH}' "$@"
code=$?
after=$({state})
echo "$before" > before; echo "$after" > after; diff before after
echo "alive $code"
"""
    given = [*machine.folders, "true"] if arguments else ["x"]
    done = run(shell, "-c", script, "shell", *given, cwd=machine.home, PATH=machine.path, CODE=5)
    assert done.stdout.removeprefix("from inside\n") == f"alive {5 if arguments else 2}\n"
    assert done.returncode == 0


# ---- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """The name and the rest of each instruction of the Dockerfile."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(name, rest.strip()) for name, rest in (line.split(" ", 1) for line in joined.splitlines())]


def test_what_the_dockerfile_copies_is_sent_and_nothing_else() -> None:
    ignored, *excepted = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#")
    assert ignored == "*"
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    assert {f"!{path}" for path in copied} == set(excepted)
    assert all((ROOT / path).is_file() for path in copied)


def distribution(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """An installed package that can be imported and does nothing."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "INSTALLER").write_text("pip\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
    files = [f"{name}/__init__.py", *(f"{info.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD"))]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def copy_of_pip(folder: Path) -> None:
    package = Path(importlib.util.find_spec("pip").origin or "").parent  # type: ignore[union-attr]
    shutil.copytree(package, folder / "pip")
    info = next(package.parent.glob("pip-*.dist-info"))
    shutil.copytree(info, folder / info.name)


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pins() -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


def test_the_image_keeps_its_torch_and_numpy(tmp_path: Path) -> None:
    """The Dockerfile's step that installs the requirements, over an image of which only the versions are real."""
    image, venv, setup = tmp_path / "image", tmp_path / "venv", tmp_path / "setup"
    distribution(image, "torch", "2.6.0a0+df5bbc09d1.nv24.12", ("sympy==1.13.1",))
    distribution(image, "numpy", "1.26.4")
    distribution(image, "protobuf", "4.24.4")
    copy_of_pip(image)
    before = checksums(image)
    # A venv cannot be on top of a venv, such as the one of the tests.
    packages = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    executable(
        tmp_path / "bin/python3",
        f"""#!/bin/sh
[ "$*" = '-m venv --system-site-packages --without-pip {venv}' ] || exit 9
'{sys.executable}' -m venv --without-pip '{venv}' && echo '{image}' > '{packages}/image.pth'
""",
    )
    setup.mkdir()
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, setup)
    step = next(rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)
    nvidia = tmp_path / "constraint.txt"
    nvidia.write_text("protobuf==4.24.4\ntorch==2.6.0a0+df5bbc09d1.nv24.12\n")
    path = f"{venv}/bin:{tmp_path}/bin:{os.environ['PATH']}"
    words = ("bash", "-o", "pipefail", "-c", step.replace("/opt/iais", str(venv)))
    done = run(*words, cwd=setup, PATH=path, PIP_CONSTRAINT=nvidia, PIP_COMPILE=0)
    if done.returncode:
        probe = ("-m", "pip", "download", "--no-deps", "--dest", tmp_path, f"msgpack=={pins()['msgpack']}")
        if run(sys.executable, *probe).returncode:
            pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checksums(image) == before

    code = (
        "import importlib.metadata, json; found = reversed(list(importlib.metadata.distributions()))\n"
        "print(json.dumps({d.name: [d.version, str(d.locate_file(''))] for d in found}))"
    )
    done = run(venv / "bin/python", "-c", code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    installed = {re.sub(r"[-_.]+", "-", name).lower(): where for name, where in json.loads(done.stdout).items()}
    assert installed.pop("torch") == ["2.6.0a0+df5bbc09d1.nv24.12", str(image)]
    assert installed.pop("numpy") == ["1.26.4", str(image)]
    assert installed.pop("pip")[1] == str(image)
    assert {name: version for name, (version, _) in installed.items()} == {name: pins()[name] for name in installed}
    assert {place for _, place in installed.values()} == {str(packages)}
    wanted = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert {name.lower() for name in wanted} <= {*installed, "torch", "numpy"}


# ---- install_horovod.sh


class Environment:
    """A virtual environment of nothing but what a test puts into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv/bin/python"
        self.packages = next((folder / "venv/lib").iterdir()) / "site-packages"

    def add_torch(self, version: str = "2.13.0+cpu", cuda: str | None = None, standard: int = 20) -> None:
        """As much of torch as can be looked at without importing it."""
        (self.packages / "torch/utils").mkdir(parents=True)
        (self.packages / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        (self.packages / "torch/utils/cpp_extension.py").write_text(f"cflags = ['-std=c++{standard}']\n")

    def install(self, **changes: object) -> subprocess.CompletedProcess[str]:
        return run("bash", INSTALL, self.python, **{"XDG_CACHE_HOME": self.folder / "cache"} | changes)

    def is_untouched(self) -> bool:
        wheels = (self.folder / "cache").rglob("*.whl")
        return not any(wheels) and not list(self.packages.glob("horovod*"))


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_horovod_needs_a_python_with_torch_and_pip(bare: Environment) -> None:
    says(run("bash", INSTALL, bare.folder / "none"), 2, f"no Python at {bare.folder}/none")
    says(run("bash", INSTALL, "--help"), 2, "usage: scripts/install_horovod.sh [PYTHON]")
    says(bare.install(), 2, f"{bare.python} has no torch")
    bare.add_torch()
    says(bare.install(), 2, f"{bare.python} has no pip")
    assert bare.is_untouched()


COMPILERS = ("c++*", "g++*", "gcc*", "clang*", "cc", "*-linux-gnu-*")


def test_horovod_needs_a_compiler(bare: Environment, machine: Machine) -> None:
    bare.add_torch()
    copy_of_pip(bare.packages)
    path = machine.path_without(*COMPILERS)
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        says(bare.install(PATH=path), 3, "Python.h; install the headers of this Python")
        return
    says(bare.install(PATH=path), 3, "no C++ compiler")
    executable(Path(path) / "g++", "#!/bin/sh\necho 'unknown option -std=c++20' >&2\nexit 1\n")
    says(bare.install(PATH=path), 3, "g++ does not compile C++20, which torch 2.13.0+cpu needs")
    assert bare.is_untouched()


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or not (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    reason="no C++ compiler or no Python.h",
)


def empty_wheel(folder: Path, name: str) -> None:
    info = f"{name}-{pins()[name]}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{pins()[name]}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {pins()[name]}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@needs_compiler
def test_a_source_that_is_not_horovods(bare: Environment) -> None:
    bare.add_torch()
    copy_of_pip(bare.packages)
    index = bare.folder / "index"
    index.mkdir()
    pip = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": index, "PIP_CONFIG_FILE": os.devnull, "TMPDIR": bare.folder}
    done = bare.install(**pip)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    log = re.fullmatch(r"horovod: pip could not fetch the source or the build tools \(above\); the whole log is in (.*)", line)
    assert log is not None, line
    assert "setuptools" in Path(log[1]).read_text()

    for name in ("setuptools", "packaging", "cmake"):
        empty_wheel(index, name)
    (index / "horovod-0.28.1.tar.gz").write_bytes(b"something else")
    done = bare.install(**pip)
    assert done.returncode == 1
    assert "is damaged or another file: its sha256 is not 92a43f5a" in done.stderr.splitlines()[-1]
    assert bare.is_untouched()
    assert not list(bare.folder.glob("horovod.*"))


@needs_compiler
@pytest.mark.parametrize(
    ("nvcc", "header", "expected"),
    [
        ("12.6", "torch", "with NCCL (CUDA 12.6 in {cuda}, NCCL 2.23.4 in {packages}/nvidia/nccl)"),
        ("12.8", "system", "with NCCL (CUDA 12.8 in {cuda}, NCCL 2.23.4 in {cuda})"),
        ("13.0", "torch", "with Gloo (torch is built for CUDA 12.6, but nvcc in {cuda} is 13.0)"),
    ],
)
def test_gpus_are_used_where_torch_can(bare: Environment, nvcc: str, header: str, expected: str) -> None:
    """What the script says before it builds; here it ends after that, since pip finds nothing."""
    bare.add_torch("2.6.0a0+df5bbc09d1.nv24.12", "12.6", 17)
    copy_of_pip(bare.packages)
    cuda = bare.folder / "cuda"
    executable(cuda / "bin/nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
    nccl = bare.packages / "nvidia/nccl" if header == "torch" else cuda
    (nccl / "include").mkdir(parents=True)
    (nccl / "include/nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 23\n#define NCCL_PATCH 4\n")
    executable(nccl / "lib/libnccl.so.2", "")
    done = bare.install(HOROVOD_CUDA_HOME=cuda, PIP_NO_INDEX=1, PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    line = done.stderr.splitlines()[0]
    assert line.startswith("horovod: building 0.28.1 for torch 2.6.0a0+df5bbc09d1.nv24.12 in C++17, ")
    assert expected.format(cuda=cuda, packages=bare.packages) in line
    assert done.returncode == 1


HAS_HOROVOD = importlib.util.find_spec("horovod") is not None


@pytest.mark.skipif(not HAS_HOROVOD, reason="no horovod (scripts/install_horovod.sh)")
def test_a_second_installation_does_nothing() -> None:
    assert run("bash", INSTALL, sys.executable).returncode == 0
    started = time.monotonic()
    done = run("bash", INSTALL, sys.executable)
    assert time.monotonic() - started < 5  # 0.1 on an idle machine; building takes minutes
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not HAS_HOROVOD, reason="no horovod (scripts/install_horovod.sh)")
def test_another_environment_gets_the_wheel_from_the_cache(bare: Environment, machine: Machine) -> None:
    """One that has everything but horovod; and it gets it again when what it has is damaged."""
    ours = Path(torch.__file__).parent.parent
    others = bare.folder / "others"
    others.mkdir()
    for path in ours.iterdir():
        if not path.name.startswith("horovod"):
            (others / path.name).symlink_to(path)
    (bare.packages / "others.pth").write_text(f"{others}\n")
    cache = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", ""), "PATH": machine.path_without(*COMPILERS)}
    done = bare.install(**cache)
    if done.returncode == 3:
        pytest.skip("no wheel of this recipe in the cache (scripts/install_horovod.sh)")
    assert done.returncode == 0, done.stderr
    assert f"installed 0.28.1 for torch {torch.__version__}, with " in done.stderr.splitlines()[-1]
    library = next((bare.packages / "horovod/torch").glob("mpi_lib_v2*"))
    whole = library.read_bytes()
    code = "import horovod, horovod.torch as hvd; hvd.init(); print(horovod.__file__, hvd.size())"
    assert run(bare.python, "-c", code).stdout == f"{bare.packages}/horovod/__init__.py 1\n"

    library.write_bytes(whole[:1000])
    done = bare.install(**cache)
    assert done.returncode == 0, done.stderr
    assert library.read_bytes() == whole

    uninstalled = run(bare.python, "-m", "pip", "uninstall", "--yes", "horovod")
    assert uninstalled.returncode == 0, uninstalled.stderr
    assert not list(bare.packages.glob("horovod*"))


# ---- all shell scripts


def linter(name: str) -> str:
    """The program, which requirements-dev.txt puts beside the interpreter of the tests."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}")
    return found


def test_shell_scripts_are_clean() -> None:
    scripts = [LAUNCH, ROOT / ".ci/run", *(ROOT / "scripts").glob("*.sh")]
    assert len(scripts) >= 4
    done = run(linter("shellcheck"), *scripts)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dockerfile_is_clean() -> None:
    done = run(linter("hadolint"), ROOT / "Dockerfile")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_horovod_is_pinned_with_what_it_needs() -> None:
    named = re.search(r"(cloudpickle .*) &&$", INSTALL.read_text(), re.MULTILINE)
    assert named is not None
    wanted = set(named[1].split())
    assert {*wanted, "pycparser", "setuptools", "cmake"} <= pins().keys()
    if HAS_HOROVOD:
        required = {re.split(r"[ <>=;(]", line)[0].lower() for line in metadata.requires("horovod") or () if ";" not in line}
        assert wanted == required

"""The Dockerfile and the start of its container, with stand-ins for what a test cannot have."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.standins import PINS, ROOT, Docker, copy_pip, environment, executable, path_without, run, says

LAUNCH = ROOT / "launch_container.sh"
COMMAND = ("python", "-c", "print('a  b')", "--IAIS", "", "*")
# Print options, functions, aliases, traps and variables, except those that change by themselves.
STATE = {
    "bash": "set -o; shopt; declare -F; alias; trap; pwd; declare -p"
    " | grep -vE '^declare [^ ]+ (BASH_|EPOCH|FUNCNAME|LINENO|_=|PIPESTATUS|RANDOM|SECONDS|SRANDOM|before|after|code)'",
    "zsh": "setopt; functions; alias; trap; pwd; typeset"
    " | grep -vE '(^| )(EPOCH.*|LINENO|_|[?]|status|pipestatus|RANDOM|SECONDS|TTYIDLE|ZSH_SUBSHELL|before|after|code)='",
}
SHELLS = [pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name}")) for name in STATE]


class Machine(Docker):
    """Four folders with awkward names, and a ``docker``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.home = folder
        self.folders = [folder / name for name in ("txt db", "img,db", 'out "put"', "pre'trained")]
        for path in self.folders:
            path.mkdir()

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


@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize("shell", SHELLS)
def test_launch_passes_folders_command_and_exit_code(machine: Machine, shell: str, sourced: bool) -> None:
    words = [shell, "-c", f"source '{LAUNCH}' \"$@\"", "shell"] if sourced else [shell, LAUNCH]
    relative = [path.name for path in machine.folders]
    done = run(*words, *relative, *COMMAND, cwd=machine.home, PATH=machine.path, CODE=37, CDPATH=machine.home)
    assert (done.returncode, done.stdout, done.stderr) == (37, "from inside\n", "")
    assert machine.recorded() == machine.expected(*COMMAND)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"gpus": ("--gpus", '"device=0"')}),
        ({"CUDA_VISIBLE_DEVICES": "2, 3"}, {"gpus": ("--gpus", '"device=2,3"')}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, {"gpus": ("--gpus", '"device=GPU-1a2b"')}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {"gpus": ("--env", "NVIDIA_VISIBLE_DEVICES=void")}),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"gpus": ("--env", "NVIDIA_VISIBLE_DEVICES=void")}),
        ({"IAIS_IMAGE": "mine:2", "IMAGE": "mine:2"}, {"image": "mine:2"}),
    ],
)
def test_launch_passes_gpus_and_image(machine: Machine, changes: dict[str, str], expected: dict[str, object]) -> None:
    done = run("bash", LAUNCH, *machine.folders, "true", PATH=machine.path, **changes)
    assert done.returncode == 0, done.stderr
    assert machine.recorded() == machine.expected("true", **expected)


@pytest.mark.parametrize("command", [(), ("nvidia-smi",)])
def test_launch_in_a_terminal_is_interactive(machine: Machine, command: tuple[str, ...]) -> None:
    ours, theirs = pty.openpty()
    words = ["bash", str(LAUNCH), *map(str, machine.folders), *command]
    done = subprocess.run(words, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment(PATH=machine.path))
    os.close(theirs)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    assert machine.recorded() == machine.expected(*(command or ["bash"]), gpus=("--gpus", "all", "--interactive", "--tty"))


def test_launch_refuses_what_is_missing(machine: Machine) -> None:
    text, images, output, pretrained = machine.folders

    def refused(message: str, *arguments: object, **changes: object) -> None:
        says(run("bash", LAUNCH, *(arguments or (*machine.folders, "true")), **{"PATH": machine.path} | changes), 2, message)
        assert not machine.record.exists()

    refused("usage: launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED", text, images, output)
    refused(f"IMG_DB: cannot enter folder '{machine.home}/none'", text, machine.home / "none", output, pretrained, "true")
    refused(f"PRETRAINED: cannot enter folder '{machine.bin}/docker'", text, images, output, machine.bin / "docker", "true")
    refused("an interactive bash requires one", *machine.folders)
    refused("the docker daemon does not answer", INFO=1)
    refused(f"no image 'other'; build it with 'docker build --tag other \"{ROOT}\"'", IAIS_IMAGE="other")
    bare = path_without(machine.home / "programs", machine.path, "docker", "nvidia-*")
    refused("docker not found; install it", PATH=bare)
    (Path(bare) / "docker").symlink_to(machine.bin / "docker")
    refused("GPUs require the NVIDIA Container Toolkit", PATH=bare, RUNTIMES="runc ")
    assert run("bash", LAUNCH, *machine.folders, "true", PATH=bare, RUNTIMES="runc ", CUDA_VISIBLE_DEVICES="").returncode == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root can write everywhere")
def test_launch_refuses_a_read_only_output(machine: Machine) -> None:
    machine.folders[2].chmod(0o555)
    says(run("bash", LAUNCH, *machine.folders, "true", PATH=machine.path), 2, "OUTPUT: ")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("arguments", [0, 4], ids=["refused", "started"])
def test_sourcing_leaves_the_shell_unchanged(machine: Machine, shell: str, arguments: int) -> None:
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


def instructions() -> list[tuple[str, str]]:
    """Return name and rest of each instruction of the Dockerfile."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(name, rest.strip()) for name, rest in (line.split(" ", 1) for line in joined.splitlines())]


def test_docker_is_sent_what_the_dockerfile_copies() -> None:
    ignored, *excepted = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#")
    assert ignored == "*"
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    assert {f"!{path}" for path in copied} == set(excepted)
    assert all((ROOT / path).is_file() for path in copied)


def distribution(folder: Path, name: str, version: str, requires: str = "") -> None:
    """Install a package that can be imported and does nothing."""
    info = folder / f"{name}-{version}.dist-info"
    files = {
        info / "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        info / "INSTALLER": "pip\n",
        folder / name / "__init__.py": f"__version__ = {version!r}\n",
    }
    files[info / "RECORD"] = "".join(f"{path.relative_to(folder)},,\n" for path in (*files, info / "RECORD"))
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_image_keeps_its_torch_and_numpy(tmp_path: Path) -> None:
    """The Dockerfile's step that installs the requirements, on an image of which only the versions are real."""
    image, venv, setup = tmp_path / "image", tmp_path / "venv", tmp_path / "setup"
    distribution(image, "torch", "2.6.0a0+df5bbc09d1.nv24.12", "Requires-Dist: sympy==1.13.1\n")
    distribution(image, "numpy", "1.26.4")
    distribution(image, "protobuf", "4.24.4")
    copy_pip(image)
    before = checksums(image)
    # A venv cannot be on top of a venv, such as that of the tests.
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
    probe = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, f"msgpack=={PINS['msgpack']}")
    if done.returncode and run(*probe).returncode:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checksums(image) == before

    code = (
        "import importlib.metadata, json; found = reversed(list(importlib.metadata.distributions()))\n"
        "print(json.dumps({d.name: [d.version, str(d.locate_file(''))] for d in found}))"
    )
    installed = {
        canonicalize_name(k): v for k, v in json.loads(run(venv / "bin/python", "-c", code, PYTHONPATH="").stdout).items()
    }
    assert installed.pop("torch") == ["2.6.0a0+df5bbc09d1.nv24.12", str(image)]
    assert installed.pop("numpy") == ["1.26.4", str(image)]
    assert installed.pop("pip")[1] == str(image)
    assert installed == {name: [PINS[name], str(packages)] for name in installed}
    wanted: set[str] = {canonicalize_name(name) for name in re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())}
    assert wanted <= {*installed, "torch", "numpy"}


@pytest.mark.parametrize(
    ("linter", "files"),
    [("shellcheck", [LAUNCH, ROOT / ".ci/run", *sorted((ROOT / "scripts").glob("*.sh"))]), ("hadolint", [ROOT / "Dockerfile"])],
)
def test_shell_scripts_and_dockerfile_are_clean(linter: str, files: list[Path]) -> None:
    program = shutil.which(linter, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"no {linter}")
    done = run(program, *files)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""The Dockerfile and the start of its container, with stand-ins for what a test cannot have."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.standins import PINS, ROOT, Docker, copy_pip, environment, executable, run, says

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

    def launch(self, *arguments: object, **changes: object) -> subprocess.CompletedProcess[str]:
        return run("bash", LAUNCH, *(arguments or (*self.folders, "true")), **{"PATH": self.path} | changes)

    def expected(self, *command: str, gpus: tuple[str, ...] = ("--gpus", "all"), image: str = "iais") -> list[str]:
        sources = (ROOT, *(str(folder).replace('"', '""') for folder in self.folders))
        targets = ("/src", "/txt,readonly", "/img,readonly", "/storage", "/pretrain,readonly")
        mounts = [f'type=bind,"source={source}",target={target}' for source, target in zip(sources, targets, strict=True)]
        return [
            *("run", "--rm", "--init", "--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
            *("--user", f"{os.getuid()}:{os.getgid()}", "--workdir", "/src"),
            *(word for mount in mounts for word in ("--mount", mount)),
            *(*gpus, image, *command),
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_launch_passes_folders_command_and_exit_code(machine: Machine, shell: str) -> None:
    relative = [path.name for path in machine.folders]
    for words in ([shell, "-c", f"source '{LAUNCH}' \"$@\"", "shell"], [shell, LAUNCH]):
        done = run(*words, *relative, *COMMAND, cwd=machine.home, PATH=machine.path, CODE=37, CDPATH=machine.home)
        assert (done.returncode, done.stdout, done.stderr) == (37, "from inside\n", "")
        assert machine.recorded() == machine.expected(*COMMAND)
        machine.record.unlink()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"gpus": ("--gpus", '"device=0"')}),
        ({"CUDA_VISIBLE_DEVICES": "2, GPU-1a2b"}, {"gpus": ("--gpus", '"device=2,GPU-1a2b"')}),
        ({"CUDA_VISIBLE_DEVICES": "", "RUNTIMES": "runc "}, {"gpus": ("--env", "NVIDIA_VISIBLE_DEVICES=void")}),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"gpus": ("--env", "NVIDIA_VISIBLE_DEVICES=void")}),
        ({"IAIS_IMAGE": "mine:2", "IMAGE": "mine:2"}, {"image": "mine:2"}),
    ],
)
def test_launch_passes_gpus_and_image(machine: Machine, changes: dict[str, str], expected: dict[str, Any]) -> None:
    done = machine.launch(**changes)
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
    bare = machine.home / "programs"
    bare.mkdir()
    for name in ("bash", "dirname", "id", "cat"):
        (bare / name).symlink_to(shutil.which(name) or "")

    def refused(message: str, *arguments: object, **changes: object) -> None:
        says(machine.launch(*arguments, **changes), 2, message)
        assert not machine.record.exists()

    refused("usage: launch_container.sh TXT_DB IMG_DB OUTPUT PRETRAINED", text, images, output)
    refused(f"IMG_DB: cannot enter folder '{machine.home}/none'", text, machine.home / "none", output, pretrained, "true")
    refused(f"PRETRAINED: cannot enter folder '{machine.bin}/docker'", text, images, output, machine.bin / "docker", "true")
    refused("an interactive bash requires one", *machine.folders)
    refused("the docker daemon does not answer", INFO=1)
    refused(f"no image 'other'; build it with 'docker build --tag other \"{ROOT}\"'", IAIS_IMAGE="other")
    refused("docker not found; install it", PATH=bare)
    refused("GPUs require the NVIDIA Container Toolkit", PATH=f"{machine.bin}:{bare}", RUNTIMES="runc ")
    if os.getuid() != 0:  # who can write everywhere
        output.chmod(0o555)
        refused("OUTPUT: cannot write to")


@pytest.mark.parametrize("shell", SHELLS)
def test_sourcing_leaves_the_shell_unchanged(machine: Machine, shell: str) -> None:
    script = f"""before=; after=; code=
before=$({STATE[shell]})
source '{LAUNCH}' "$@"
code=$?
after=$({STATE[shell]})
echo "$before" > before; echo "$after" > after; diff before after
echo "alive $code"
"""
    for arguments, expected in ((["x"], "alive 2\n"), ([*machine.folders, "true"], "from inside\nalive 5\n")):
        done = run(shell, "-c", script, "shell", *arguments, cwd=machine.home, PATH=machine.path, CODE=5)
        assert (done.returncode, done.stdout) == (0, expected)


def instructions() -> list[tuple[str, str]]:
    """Return name and rest of each instruction of the Dockerfile."""
    joined = re.sub(r"(?m)^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text())
    return [(name, rest.strip()) for name, rest in re.findall(r"(?m)^(\S+) (.*)", joined)]


def test_docker_is_sent_what_the_dockerfile_copies() -> None:
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    ignored, *excepted = re.findall(r"(?m)^[^#\n]+", (ROOT / ".dockerignore").read_text())
    assert (ignored, {*excepted}) == ("*", {f"!{path}" for path in copied})
    assert all((ROOT / path).is_file() for path in copied)


def test_image_keeps_its_torch_and_numpy(tmp_path: Path) -> None:
    """The Dockerfile's step that installs the requirements, on an image of which only the versions are real."""
    image, venv = tmp_path / "image", tmp_path / "venv"
    for name, version in {"torch": "2.6.0a0+df5bbc09d1.nv24.12", "numpy": "1.26.4", "protobuf": "4.24.4"}.items():
        info = image / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    copy_pip(image)
    before = {path: path.read_bytes() for path in image.glob("*.dist-info/*")}
    # A venv cannot be on top of a venv, such as that of the tests.
    packages = venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    executable(
        tmp_path / "bin/python3",
        f"""#!/bin/sh
[ "$*" = '-m venv --system-site-packages --without-pip {venv}' ] || exit 9
'{sys.executable}' -m venv --without-pip '{venv}' && echo '{image}' > '{packages}/image.pth'
""",
    )
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nvidia.txt").write_text("protobuf==4.24.4\ntorch==2.6.0a0+df5bbc09d1.nv24.12\n")
    step = next(rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)
    changes = {"PATH": f"{venv}/bin:{tmp_path}/bin:{os.environ['PATH']}", "PIP_CONSTRAINT": tmp_path / "nvidia.txt"}
    done = run("bash", "-o", "pipefail", "-c", step.replace("/opt/iais", str(venv)), cwd=tmp_path, PIP_COMPILE=0, **changes)
    probe = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, f"msgpack=={PINS['msgpack']}")
    if done.returncode and run(*probe).returncode:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in image.glob("*.dist-info/*")} == before
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions(path=[str(packages)])}
    wanted = {canonicalize_name(name) for name in re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())}
    assert wanted - installed.keys() == {"torch", "numpy"}
    assert "pip" not in installed
    assert installed.items() <= PINS.items()


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

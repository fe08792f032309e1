"""Run every command in hostile environments, and print a table of the outcomes.

    python -m tests.test_environments [--commands NAME …] [--environments NAME …]

A disturbed run may end with its result, with one line and exit code 2, or as its environment demands. Then the command is run
again undisturbed, and its output must be that of a run which nothing disturbed. Requires Linux and the right to mount.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import pytest
import torch

from data.sources.download import DATASETS
from examples.scenes.dataset import Recipe, make_scenes
from model.checkpoint import save_checkpoint
from model.config import UniterConfig
from model.retrieval import RetrievalModel
from tests.conftest import BUNDLED
from tests.processes import ENVIRONMENT, ROOT

SECONDS = 200  # after which a run counts as hanging
TEXTS, IMAGES = str(BUNDLED.text_db), str(BUNDLED.image_db)
MODEL = {"checkpoint": str(BUNDLED.folder / "model.pt"), "model_config": str(BUNDLED.folder / "model.json"), "device": "cpu"}
TRAINING = MODEL | {
    "train_txt_dbs": [TEXTS], "train_img_dbs": [IMAGES], "val_txt_db": TEXTS, "val_img_db": IMAGES, "n_workers": 2,
    "negative_size": 7, "hard_neg_size": 3, "train_batch_size": 2, "num_train_steps": 4, "warmup_steps": 1, "valid_steps": 2,
    "save_steps": 1, "inf_minibatch_size": 8, "image_cache": 0, "IAIS": "singular",
}  # fmt: skip
PAIRS = MODEL | {"txt_db": TEXTS, "img_db": IMAGES}
SCENES = {"checkpoint": "{data}/model.pt", "model_config": str(ROOT / "config/uniter-tiny.json"), "img_db": "{data}/db"}
SCENES |= {"device": "cpu", "output_dir": "{output}"}


def _words(program: str, options: dict[str, Any], *more: str) -> tuple[str, ...]:
    return (program, *more, *(str(word) for name, value in options.items() for word in (f"--{name}", value)))


# {data} is the folder of inputs, {output} a path on the small disk. The demo, which runs these programs, would take too long.
COMMANDS = {
    "train": ("train_itm_hard_negatives.py", "--config", "{data}/training.json", "--output_dir", "{output}", "--resume"),
    "inf_itm": _words("inf_itm.py", PAIRS | {"n_workers": 2, "output_dir": "{output}"}, "--report"),
    "eval_isda": _words("scripts/eval_isda.py", SCENES | {"entities": "{data}/scenes/entities"}),
    "eval_winoground": _words("scripts/eval_winoground.py", SCENES | {"examples": "{data}/scenes/winoground/examples.jsonl"}),
    "report": ("scripts/report.py", "{data}/test", "--output", "{output}", "--images", "{data}/scenes/images"),
    "visualize pair": _words("scripts/visualize.py", PAIRS | {"text_id": "{text}", "output": "{output}.png"}, "pair"),
    "visualize run": ("scripts/visualize.py", "run", "{data}/run", "--output", "{output}.png"),
    "search": _words("scripts/search.py", MODEL, IMAGES, "a dog", "a man on a horse"),
    "ablate": ("scripts/ablate.py", "{data}/grid.json", "--output", "{output}", "--jobs", "2"),
    "make_scenes": _words("scripts/make_scenes.py", {"output": "{output}", "train": 6, "val": 2, "test": 4, "workers": 2}),
    "create_txtdb": _words(
        "scripts/create_txtdb.py", {"annotations": "{data}/scenes/dataset_scenes.json", "split": "test", "output": "{output}"}
    ),
    "convert_imgdir": ("scripts/convert_imgdir.py", "--img_dir", "{data}/scenes/features", "--output", "{output}"),
    "inspect_db": ("scripts/inspect_db.py", TEXTS, IMAGES, "--plot", "{output}.png"),
    "download_itm": ("scripts/download_itm.py", "{output}", "flickr", "--from", "{data}/storage"),
}


class Environment(NamedTuple):
    """Bash that runs the command ``"$@"``, in a mount namespace of its own; ``$disk`` is the disk that it writes to.

    Attributes:
        before, after: start and end a disturbance that outlasts the command.
        codes: allowed exit codes.
    """

    run: str = '"$@"'
    before: str = ""
    after: str = ""
    codes: tuple[int, ...] = (0, 2)


_DEVICES = "mkdir $scratch/dev; mount -t tmpfs tmpfs $scratch/dev; for name in null zero full random urandom; do "
_DEVICES += "touch $scratch/dev/$name; mount --bind /dev/$name $scratch/dev/$name; done; mount --rbind $scratch/dev /dev"
_SMALL = "mount -t tmpfs -o size={} tmpfs /dev/shm"
ENVIRONMENTS = {
    "undisturbed": Environment(codes=(0,)),
    "no /dev/shm": Environment(before=_DEVICES, after="umount -l /dev"),
    "/dev/shm of 64 MB": Environment(before=_SMALL.format("64m"), after="umount /dev/shm"),
    "/dev/shm of 64 kB": Environment(before=_SMALL.format("64k"), after="umount /dev/shm"),
    "read-only /dev/shm": Environment(before=_SMALL.format("64m -r"), after="umount /dev/shm"),
    "20 descriptors": Environment('ulimit -n 20; "$@"'),
    "files of 10 kB": Environment('ulimit -f 10; "$@"'),
    "full disk": Environment(before="mount -o remount,size=$half $disk", after="mount -o remount,size=1g $disk"),
    "read-only disk": Environment(before="mount -o remount,ro $disk", after="mount -o remount,rw $disk"),
    "stdin, stdout closed": Environment('"$@" <&- >&-'),
    "stderr closed": Environment('"$@" 2>&-'),
    "stdout full": Environment('"$@" > /dev/full'),
    "stderr full": Environment('"$@" 2> /dev/full'),
    "stdout to head": Environment('"$@" | head -1; exit ${PIPESTATUS[0]}', codes=(0, 141)),
    "no HOME": Environment('env -u HOME "$@"', codes=(0,)),
    "C locale": Environment('LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 "$@"', codes=(0,)),
    "SIGINT ignored": Environment('trap "" INT; "$@" & sleep $moment; kill -INT $!; wait $!', codes=(0,)),
    "two at once": Environment('"$@" & "$@" > /dev/null; code=$?; wait $!; exit $(($? && code ? 99 : 0))', codes=(0,)),
    "Ctrl-C": Environment('set -m; "$@" & sleep $moment; kill -INT -- -$!; wait $!', codes=(0, 130)),
    "SIGTERM": Environment('"$@" & sleep $moment; kill $!; wait $!', codes=(0, 143)),
    "killed": Environment('"$@" & sleep $moment; kill -9 $!; wait $!', codes=(0, 137)),
}
# A run that succeeds is not repeated: its own output is compared.
_ARENA = """
disk=$1 scratch=$2 half=$3 moment=$4; shift 4
mount -t tmpfs -o size=1g tmpfs $disk && export TMPDIR=$disk || exit 1
cat > $scratch/run; touch $scratch/stdout2 $scratch/stderr2
{before}
timeout -k 5 {seconds} bash $scratch/run "$@" > $scratch/stdout1 2> $scratch/stderr1 < /dev/null
code=$?
{after}
[ $code = 0 ] || timeout -k 5 {seconds} "$@" > $scratch/stdout2 2> $scratch/stderr2 < /dev/null
echo $code $? > $scratch/codes
cp -a $disk/. $scratch/kept
"""


class Outcome(NamedTuple):
    """A word for the table, what is wrong, if anything, and what the command wrote."""

    word: str
    finding: str
    files: dict[str, str]
    bytes: int
    seconds: float


def try_out(command: str, name: str, data: Path, expected: Outcome | None = None, seed: int = 0) -> Outcome:
    """Run ``command`` in the environment ``name``, then undisturbed; its output must be the ``expected`` one."""
    environment = ENVIRONMENTS[name]
    moment = random.Random(f"{command} {name} {seed}").uniform(0.1, expected.seconds if expected else 1)
    with tempfile.TemporaryDirectory() as folder:
        scratch, disk = Path(folder) / "scratch", Path(folder) / "disk"
        (scratch / "kept").mkdir(parents=True)
        disk.mkdir()
        names = {"data": data, "output": disk / "output", "text": BUNDLED.source().text_db.ids[3]}
        words = [sys.executable, *(word.format_map(names) for word in COMMANDS[command])]
        arena = _ARENA.format(before=environment.before, after=environment.after, seconds=SECONDS)
        started = time.monotonic()
        half = f"{(expected.bytes if expected else 0) // 2048 + 4}k"
        subprocess.run(
            ["unshare", "-m", "bash", "-c", arena, "bash", disk, scratch, half, f"{moment:.2f}", *words],
            input=f"moment={moment:.2f}\n{environment.run}",
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            check=True,
        )
        seconds = (time.monotonic() - started) / 2
        first, second = map(int, (scratch / "codes").read_text().split())
        streams = [
            (scratch / f"{stream}{number}").read_text(errors="replace") for stream in ("stdout", "stderr") for number in (1, 2)
        ]
        files = _digests(scratch / "kept", disk)
        if not files:  # the command only prints
            redirected = not first and re.search("[>|]", environment.run)
            files = expected.files if redirected and expected else {"stdout": streams[first != 0]}
        size = sum(path.stat().st_size for path in (scratch / "kept").rglob("*") if path.is_file())
        leftovers = [path.name for path in (scratch / "kept").rglob("*.partial")]
    refused = first == 2
    changed = sorted({path for path, _ in files.items() ^ expected.files.items()}) if expected else []
    findings = {
        "hangs": 124 in (first, second),
        f"exit code {first}": first not in (*environment.codes, 1 if command == "ablate" else 0),  # 1: a run has failed
        "traceback": re.search("Traceback|Exception ignored|terminate called|core dumped", "".join(streams)),
        "no reason": refused and "2>" not in environment.run and not re.search(r"(?m)^error: .+$", streams[2]),
        f"exit code {second} when run again": second and not re.search("already exists|not empty", streams[3]),
        f"leaves {leftovers}": leftovers,
        f"another result in {', '.join(changed)}": changed,
    }
    finding = ", ".join(text for text, found in findings.items() if found)
    word = {0: "result", 1: "refused", 2: "refused"}.get(first, "ended")
    return Outcome(word, finding and "\n".join((finding, *streams)), files, size, seconds)


_VOLATILE = {"seconds", "provenance", "made_by"}  # keys of JSON files
_UNSTABLE = re.compile(
    r"log\.txt|scalars\.jsonl|events\..*|git\.json|hps\.json|seconds\.json|seed-.*\.txt|lock\.mdb|.*\.lock|state-.*"
)


def _digests(kept: Path, disk: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a command wrote, but for what differs between any two runs."""
    return {
        str(path.relative_to(kept)): hashlib.sha256(_contents(path, str(disk).encode())).hexdigest()
        for path in kept.glob("output*/**/*" if (kept / "output").is_dir() else "output*")
        if path.is_file() and not _UNSTABLE.fullmatch(path.name)
    }


def _contents(path: Path, disk: bytes) -> bytes:
    if path.suffix == ".mdb":
        with lmdb.open(str(path.parent), readonly=True, lock=False) as database, database.begin() as transaction:
            return repr(list(transaction.cursor())).encode()
    if path.parent.name == "ckpt":
        return repr([(name, value.tolist()) for name, value in torch.load(path, weights_only=True).items()]).encode()
    contents = path.read_bytes().replace(disk, b"")
    return json.dumps(_stable(json.loads(contents))).encode() if path.suffix == ".json" else contents


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(part) for key, part in value.items() if key not in _VOLATILE}
    return [_stable(part) for part in value] if isinstance(value, list) else value


def make_inputs(data: Path) -> None:
    """Make what the commands read: scenes and their databases, a model, a training, an evaluation, a grid, and archives."""
    make_scenes(data / "scenes", {"train": 2, "val": 1, "test": 6}, Recipe(seed=0, twins=1.0), 1)
    torch.manual_seed(0)
    save_checkpoint(data / "model.pt", RetrievalModel(UniterConfig.from_json(SCENES["model_config"])).state_dict())
    (data / "training.json").write_text(json.dumps(TRAINING))
    databases = {"test_txt_db": TEXTS, "test_img_db": IMAGES}
    grid = {"config": str(data / "training.json"), "grid": [{"IAIS": [None, "singular"]}], "seeds": [1]}
    (data / "grid.json").write_text(json.dumps(grid | databases))
    for path in DATASETS["flickr"]:
        archive = data / "storage" / path
        archive.parent.mkdir(parents=True, exist_ok=True)
        if archive.suffix == ".tar":
            source = BUNDLED.image_db if path.startswith("img") else BUNDLED.text_db
            subprocess.run(
                ["tar", "-cf", archive, "--transform", f"s,^{source.name},{archive.stem},", "-C", source.parent, source.name],
                check=True,
            )
        else:
            archive.write_bytes(random.Random(path).randbytes(30_000))
    evaluation = _words("inf_itm.py", SCENES | {"txt_db": "{data}/texts"})
    commands = {
        "texts": COMMANDS["create_txtdb"],
        "db": COMMANDS["convert_imgdir"],
        "run": COMMANDS["train"],
        "test": evaluation,
    }
    for output, command in commands.items():
        words = [word.format(data=data, output=data / output) for word in command]
        subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)


def campaign(commands: Sequence[str], environments: Sequence[str], jobs: int = 2) -> list[str]:
    """Try the commands in the environments, print the table as Markdown, and return what is wrong."""
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make_inputs(data)

        expected = {command: try_out(command, "undisturbed", data) for command in commands}

        def row(name: str) -> str:
            outcomes = {command: try_out(command, name, data, expected[command]) for command in commands}
            findings.extend(f"{command}, {name}: {outcome.finding}" for command, outcome in outcomes.items() if outcome.finding)
            words = (
                f"**{outcome.finding.splitlines()[0]}**" if outcome.finding else outcome.word for outcome in outcomes.values()
            )
            return f"| {' | '.join((name, *words))} |"

        print(f"| environment | {' | '.join(commands)} |\n| --- {'| --- ' * len(commands)}|", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            for line in pool.map(row, environments):
                print(line, flush=True)
    return findings


_MOUNTS = subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(not _MOUNTS, reason="may not mount")


@needs_mounts
def test_a_converter_in_hostile_environments() -> None:
    assert campaign(["create_txtdb"], ["full disk", "stderr closed", "two at once", "killed"]) == []


@needs_mounts
@pytest.mark.long
def test_every_command_in_every_environment() -> None:
    assert campaign(list(COMMANDS), list(ENVIRONMENTS)) == []


@needs_mounts
@pytest.mark.parametrize(
    ("code", "environment", "finding"),
    [
        ("print(1 / 0)", "undisturbed", "exit code 1, traceback, exit code 1 when run again"),
        ("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(2)", "undisturbed", "no reason"),
        ("import sys, os; open(sys.argv[1], 'a').write(str(os.getpid()))", "undisturbed", "another result in output"),
        ("import sys; open(sys.argv[1] + '.partial', 'w'); open(sys.argv[1], 'w')", "undisturbed", "leaves"),
        ("import os, time; time.sleep(99 * (not os.path.exists('/dev/shm')))", "no /dev/shm", "hangs"),
    ],
)
def test_what_must_not_happen_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, environment: str, finding: str
) -> None:
    (tmp_path / "program.py").write_text(code)
    monkeypatch.setitem(COMMANDS, "program", (str(tmp_path / "program.py"), "{output}"))
    monkeypatch.setattr("tests.test_environments.SECONDS", 2)
    expected = try_out("program", "undisturbed", tmp_path)
    assert finding in try_out("program", environment, tmp_path, expected).finding


def main() -> None:
    """Run the campaign, or the named parts of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    options = parser.parse_args()
    findings = campaign(options.commands, options.environments)
    sys.exit("\n\n".join(findings) or None)


if __name__ == "__main__":
    main()

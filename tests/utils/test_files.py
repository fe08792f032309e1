"""A pipe, a socket or a device where a file is expected is an error, not a wait; text that is not UTF-8 says so."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from data.sources import captions, entities, region_files, region_tsv
from data.tokenizer import load_tokenizer
from evaluation.candidates import read_jsonl
from evaluation.plots.regions import read_picture
from evaluation.report.runs import read_scores
from utils.errors import InputError
from utils.files import atomic_file, atomic_folder, exclusive_folder, new_folder, read_json
from utils.logging import read_scalars
from utils.tensors import load_tensors

READERS = {
    "a.json": read_json, "a.pt": load_tensors, "vocab.txt": load_tokenizer, "a.jpg": read_picture, "a.tsv": region_tsv.kind_of,
    "hw.tsv": region_tsv.read_sizes, "a.txt": entities.read_sentences, "a.xml": entities.read_boxes,
    "a.npz": region_files.load_npz, "a.csv": lambda path: [*captions.all_captions(path)],
    "a.jsonl": lambda path: [*read_jsonl(path, dict, "")], "scores.npz": lambda path: read_scores(path.parent),
    "scalars.jsonl": lambda path: read_scalars(path.parent),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.alarm(20)  # or the test would wait for ever
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    for make in (os.mkfifo, socket.socket(socket.AF_UNIX).bind, lambda path: os.symlink("/dev/zero", path)):
        make(name)
        with pytest.raises(InputError, match=r"not a regular file|No such device or address"):
            READERS[name](tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: is a folder, a device or a pipe"), atomic_file(tmp_path / name):
            pass
        os.unlink(name)
    signal.alarm(0)


@pytest.mark.parametrize("name", ["a.json", "vocab.txt", "a.csv"])
def test_utf8_is_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(InputError, match=f"{name}: line 2: byte 0xe9 is not UTF-8, expected text in UTF-8"):
        READERS[name](tmp_path / name)


def test_what_a_killed_or_ending_process_leaves_of_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch()
    assert new_folder(tmp_path) == tmp_path
    monkeypatch.setattr("utils.files.lock", lambda file, folder: (folder / ".lock").unlink())
    with pytest.raises(InputError, match="another run is using this folder"), exclusive_folder(tmp_path):
        pass
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"it holds notes\.txt"):
        new_folder(tmp_path)


def test_an_error_names_the_output_not_its_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}/page/index.html: cannot be written"):  # noqa: SIM117
        with atomic_folder(tmp_path / "page") as folder, atomic_file(folder / "index.html"):
            raise OSError(28, "No space left on device")

"""What is fuzzed: a reader, what may come of it, and a strategy for its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack
from hypothesis import strategies as st

from tests.fuzz.sandbox import Sandbox
from utils.errors import InputError

MIB = 1 << 20
SECONDS = 5  # for one input


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Attributes:
        read: takes an input's bytes; the result does not matter.
        inputs: damaged inputs.
        sound: an input that is as it should be.
        errors: what the reader documents.
        memory: what it may take at most, in bytes.
    """

    name: str
    read: Callable[[bytes], object]
    inputs: st.SearchStrategy[bytes]
    sound: bytes
    errors: tuple[type[Exception], ...] = (InputError,)
    memory: int = 64 * MIB

    def sandbox(self) -> Sandbox:
        """A child process to run it in."""
        return Sandbox(self.read, self.errors, self.memory, SECONDS, self.sound)


def write_files(folder: Path, data: bytes) -> None:
    """Put the files of ``pack_files`` into ``folder``."""
    for name, content in msgpack.unpackb(data).items():
        (folder / name).write_bytes(content)


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Several files as one input."""
    return bytes(msgpack.packb(dict(files)))


def one_of_files(files: Mapping[str, bytes], damaged: Mapping[str, st.SearchStrategy[bytes]]) -> st.SearchStrategy[bytes]:
    """All files, one of them damaged, as one input."""
    return st.sampled_from(sorted(damaged)).flatmap(
        lambda name: damaged[name].map(lambda content: pack_files({**files, name: content}))
    )

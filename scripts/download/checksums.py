"""Lists of checksums, and the checksum of a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from scripts.download.partial import BLOCK
from utils.errors import InputError

CHECKSUMS = "SHA256SUMS"


def parse_checksums(name: str, contents: bytes) -> dict[str, str]:
    """{path: hexadecimal SHA-256} of a list as ``sha256sum`` writes it. Raises ``InputError`` for anything else."""
    checksums = {}
    for number, line in enumerate(contents.decode("utf-8", "replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise InputError(f"{name}: line {number} is not a SHA-256 and a path, expected what sha256sum writes")
        checksums[match[2]] = match[1].lower()
    return checksums


def sha256(path: Path, advance: Callable[[int], None]) -> str:
    """The hexadecimal SHA-256 of a file; ``advance`` is called often, and may raise to end it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(0)
    return digest.hexdigest()

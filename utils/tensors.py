"""Files of tensors: written whole or not at all, read without running pickled code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from utils.errors import InputError
from utils.files import atomic_file
from utils.tensor_file import check_tensor_file


def save_tensors(path: str | Path, value: Any) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers and strings, atomically.

    Raises:
        InputError: the disk refuses, or a number is not finite; what was at ``path`` is still there.
    """
    _check_finite(path, value)
    with atomic_file(path) as file:
        stream = _Stream(file)
        try:
            torch.save(value, cast("IO[bytes]", stream))
        except RuntimeError as error:
            raise stream.error or error from error


def load_tensors(path: str | Path) -> Any:
    """What ``save_tensors`` wrote, or any ``.pt`` file in torch's present or pre-1.6 container; tensors arrive on the CPU.

    Raises:
        InputError: the file is missing, damaged, would run code, or claims more tensors than it has bytes for.
    """
    try:
        check_tensor_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise InputError(f"{path}: not a readable checkpoint ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not a readable checkpoint of tensors ({error})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged pickle makes it raise
        raise InputError(f"{path}: not a readable checkpoint of tensors ({type(error).__name__})") from error


class _Stream:
    """A file for ``torch.save``, which tells of a full disk by a RuntimeError that does not say so."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_finite(path: str | Path, value: Any, name: str = "") -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(path, item, f"{name} {key}".strip())
    elif isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"{path}: not written, {name} is not finite")

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.data.inspection.databases import Inspection, write_images, write_texts


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``texts.db`` and ``images``, in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    write_images(folder / "images")
    write_texts(folder / "texts.db")
    return folder


@pytest.fixture
def pair(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "pair"))


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Inspection]:
    return partial(Inspection, capsys)

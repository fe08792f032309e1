"""Small inputs that ask for much memory or time get neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.bombs import BOMBS


@pytest.mark.parametrize("group", BOMBS)
def test_bombs_stay_within_the_bounds(group: str, tmp_path: Path) -> None:
    for bomb in BOMBS[group](tmp_path):
        outcome = bomb.run()
        assert outcome.kind != "finding", (bomb.name, outcome)
        assert outcome.memory <= bomb.memory, (bomb.name, outcome)

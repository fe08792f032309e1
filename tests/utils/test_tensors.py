"""Files of tensors; full disks and damaged files are in tests/test_resume.py and tests/test_programs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.errors import InputError
from utils.tensors import save_tensors


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.zeros(3)}, "optimiser": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    save_tensors(tmp_path / "state.pt", state)
    before = (tmp_path / "state.pt").read_bytes()
    for spoilt in (state["model"]["weight"], state["optimiser"]["state"][0]["exp_avg"]):
        spoilt[1] = torch.nan
        with pytest.raises(InputError, match=r"state.pt: not written, .* (weight|exp_avg) is not finite"):
            save_tensors(tmp_path / "state.pt", state)
        spoilt[1] = 0
    assert (tmp_path / "state.pt").read_bytes() == before

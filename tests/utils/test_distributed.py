"""How workers find one another, and what one process does; several are in tests/test_workers.py."""

from __future__ import annotations

import sys

import pytest
import torch

from utils.distributed import SingleProcess, connect
from utils.errors import InputError
from utils.precision import choose_device


def test_without_a_launcher_there_is_one_process() -> None:
    with connect({"PATH": "/bin", "RANK": "0"}) as group:
        assert isinstance(group, SingleProcess)
        assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
        tensor = torch.ones(3)
        group.average(tensor)
        group.broadcast([tensor])
        assert tensor.tolist() == [1, 1, 1]
        value = {"tensor": tensor}
        assert group.share(value) is value
        assert group.gather(value) == [value]
        assert "one process" in group.launcher
        with pytest.raises(InputError, match="as it is"), group.raise_on_all_ranks():
            raise InputError("as it is")


@pytest.mark.parametrize("variable", ["HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_horovodrun_without_horovod(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(InputError, match=f"{variable} in the environment .* install it with scripts/install_horovod.sh"):
        connect({variable: "2"})


def test_torchruns_variables_have_to_be_numbers() -> None:
    environment = {"RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with pytest.raises(InputError, match="RANK in the environment is 'first', expected a number"):
        connect(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is in the environment, but MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK 5 and WORLD_SIZE 2"),
    ],
    ids=str,
)
def test_torchruns_variables_half_set(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        connect(environment)


def test_only_one_module_knows_horovod_and_torch_distributed() -> None:
    from tests.test_layout import MODULES, ROOT

    for name in ("horovod", "torch.distributed"):
        users = {module for module in MODULES if name in (ROOT / f"{module.replace('.', '/')}.py").read_text()}
        assert users == {"utils.distributed"}


@pytest.mark.parametrize(("name", "workers"), [("cuda:1", 2), ("mps", 2)])
def test_a_device_for_all_workers_is_refused(name: str, workers: int) -> None:
    with pytest.raises(InputError, match=f"device '{name}' with 2 workers on this machine, expected auto, cpu or cuda"):
        choose_device(name, 0, workers)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert [str(choose_device("auto", rank, 2)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="3 workers on a machine with 2 GPUs"):
        choose_device("cuda", 0, 3)

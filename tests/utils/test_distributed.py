"""How a rank finds the others, and what a single process does; several ranks are in tests/test_ranks.py."""

from __future__ import annotations

import sys

import pytest
import torch

from utils.distributed import SingleProcess, connect
from utils.errors import InputError
from utils.precision import choose_device

ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


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
        group.check_same({"seed": 1})
        assert "one process" in group.launcher
        with pytest.raises(InputError, match=r"^as it is$"), group.raise_on_all_ranks():
            raise InputError("as it is")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HOROVOD_SIZE": "2"}, "HOROVOD_SIZE in the environment .* install it with scripts/install_horovod.sh"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE in the environment .* install it with"),
        ({"RANK": "first", "WORLD_SIZE": "2", **ADDRESS}, "RANK in the environment is 'first', expected a number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is set, but MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "5", "WORLD_SIZE": "2", **ADDRESS}, "RANK 5 and WORLD_SIZE 2"),
    ],
    ids=str,
)
def test_mistakes_of_the_launcher(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(InputError, match=message):
        connect(environment)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:1", "mps"):
        with pytest.raises(InputError, match=f"device '{name}' with 2 ranks on this host, expected auto, cpu or cuda"):
            choose_device(name, 0, 2)
    for function, result in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, function, lambda *_, result=result: result)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert [str(choose_device("auto", rank, 2)) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="3 ranks on a host with 2 GPUs"):
        choose_device("cuda", 0, 3)

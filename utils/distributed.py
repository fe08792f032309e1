"""The ranks of one run, started by horovodrun, by torchrun, or a single process; the only module that knows which.

Every method is a collective unless it says otherwise: all ranks call the same methods in the same order. Only rank 0, the main
rank, writes files and prints.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from utils.errors import InputError, RankLost, counted, print_error
from utils.signals import killable

# A dead rank is noticed through its closed connection and its launcher; the timeout only bounds the wait for a slow one.
TIMEOUT = timedelta(minutes=30)


def connect(environment: Mapping[str, str] = os.environ) -> ProcessGroup:
    """Join the ranks of this run, as the launcher's environment variables describe them. Use the result as a context manager.

    Raises:
        InputError: horovod is needed but cannot be imported or was built without MPI, or the launcher's variables are invalid.
        RankLost: the other ranks cannot be reached.
    """
    with killable():  # the libraries wait for the other ranks in C++
        if "HOROVOD_SIZE" in environment:
            return Horovod("HOROVOD_SIZE")
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if not missing:
            return TorchDistributed(environment)
        if _integer(environment, "WORLD_SIZE", "1") > 1:
            raise InputError(f"WORLD_SIZE is set, but {', '.join(missing)} is not; start with torchrun")
        if "OMPI_COMM_WORLD_SIZE" in environment:  # mpirun, by hand or by a horovodrun that was built with MPI
            group = Horovod("OMPI_COMM_WORLD_SIZE")
            if group.world_size != _integer(environment, "OMPI_COMM_WORLD_SIZE"):
                raise InputError("started by mpirun, but horovod was built without MPI: start with horovodrun or torchrun")
            return group
        return SingleProcess()


class ProcessGroup:
    """All ranks of a run.

    Attributes:
        rank, world_size: index of this rank and number of ranks, over all hosts.
        local_rank, local_size: the same on this host.
        launcher: what started the ranks and how that was detected, for the log.
    """

    rank, world_size = 0, 1
    local_rank, local_size = 0, 1
    launcher = ""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0. Not a collective."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> None:
        """Replace ``tensor``, which is contiguous, by its mean over the ranks. Raises ``RankLost``."""
        if self.world_size > 1:
            with _rank_lost_errors():
                self._sum(tensor)
            tensor.div_(self.world_size)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each of ``tensors``, whose shapes are equal on all ranks, by that of rank 0. Raises ``RankLost``."""
        if self.world_size > 1:
            with _rank_lost_errors(), torch.no_grad():
                for tensor in tensors:
                    self._broadcast(tensor)

    def share(self, value: Any) -> Any:
        """Return rank 0's ``value``. Tensors nested in it arrive on the CPU. Raises ``RankLost``."""
        if self.world_size == 1:
            return value
        # The structure first and the tensors one by one: in a pickle they would take their memory twice.
        structure = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), value) if self.is_main else None
        with _rank_lost_errors():
            structure = self._share(structure)
        if not self.is_main:
            value = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), structure)
        self.broadcast(leaf.cpu().contiguous() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank, on rank 0; an empty list elsewhere. Raises ``RankLost``."""
        if self.world_size == 1:
            return [value]
        with _rank_lost_errors():
            values = self._gather(value)
        return values if self.is_main else []

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise the same ``InputError`` on all ranks if ``values`` differ between them; it names what differs and where."""
        expected = self.share(values)
        with self.raise_on_all_ranks():
            if different := ", ".join(name for name in values if expected.get(name) != values[name]):
                raise InputError(f"{different}: not the same as on rank 0; start all ranks with the same options and data")

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Turn an ``InputError`` of any rank within the block into an error of all, printed once with that rank's name.

        Outside such a block an error ends the other ranks too, but only through their launcher.
        """
        if self.world_size == 1:
            yield
            return
        error: InputError | None = None
        try:
            yield
        except InputError as raised:
            error = raised
        outcomes = self.gather((socket.gethostname(), error and str(error)))
        distinct = {message for _, message in outcomes}
        failed = (f"rank {rank} on {host}: {message}" for rank, (host, message) in enumerate(outcomes) if message is not None)
        message = self.share(distinct.pop() if len(distinct) == 1 else next(failed, None))
        if message is not None:
            raise _CollectiveError(message) from error

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world_size == 1:
            return
        if isinstance(error, _CollectiveError):
            if self.is_main:
                print_error(error)
            self.share(None)  # or the launcher might kill rank 0 before it has printed
            self._close()
            sys.stdout.flush()
            os._exit(2)  # at a regular exit C++ sometimes aborts because of its threads: "terminate called ..."
        if isinstance(error, InputError):
            print_error(f"rank {self.rank} on {socket.gethostname()}: {error}")
            sys.exit(2)
        if error is None:
            with _rank_lost_errors():
                self._close()

    # The collectives of a library, which a single process never calls.
    _sum: Callable[[Tensor], object]
    _broadcast: Callable[[Tensor], object]
    _share: Callable[[Any], Any]
    _gather: Callable[[Any], list[Any]]
    _close: Callable[[], object]


class SingleProcess(ProcessGroup):
    launcher = "one process: neither horovodrun's nor torchrun's variables are in the environment"


class Horovod(ProcessGroup):
    """Ranks of horovodrun or mpirun."""

    def __init__(self, variable: str) -> None:
        try:
            self.hvd: Any = importlib.import_module("horovod.torch")
        except ImportError as error:
            raise InputError(
                f"{variable} in the environment says that horovodrun or mpirun started this program, but horovod cannot be "
                f"imported ({error}): install it with scripts/install_horovod.sh, or start with torchrun"
            ) from error
        with _rank_lost_errors():
            self.hvd.init()
        self.rank, self.world_size = self.hvd.rank(), self.hvd.size()
        self.local_rank, self.local_size = self.hvd.local_rank(), self.hvd.local_size()
        backend = "NCCL" if self.hvd.nccl_built() else "Gloo" if self.hvd.gloo_built() else "MPI"
        self.launcher = f"{counted(self.world_size, 'rank')} of horovodrun ({variable} is set), gradients over {backend}"

    def _sum(self, tensor: Tensor) -> None:
        self._in_place(self.hvd.allreduce_, tensor, op=self.hvd.Sum)

    def _broadcast(self, tensor: Tensor) -> None:
        self._in_place(self.hvd.broadcast_, tensor, root_rank=0)

    def _in_place(self, operation: Callable[..., Tensor], tensor: Tensor, **settings: Any) -> None:
        """Apply ``operation`` through a copy on the CPU if horovod was built without NCCL."""
        tensor.copy_(operation(tensor if self.hvd.nccl_built() else tensor.cpu(), **settings))

    def _share(self, value: Any) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name="share")

    def _gather(self, value: Any) -> list[Any]:
        # Without a name Horovod uses that of the type, and blocks forever if one rank has an array and another None.
        return self.hvd.allgather_object(value, name="gather")

    def _close(self) -> None:
        self.hvd.shutdown()


class TorchDistributed(ProcessGroup):
    """Ranks of torchrun, or of anything else that sets its variables."""

    _sum = staticmethod(dist.all_reduce)
    _close = staticmethod(dist.destroy_process_group)

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank, self.world_size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
        self.local_rank = _integer(environment, "LOCAL_RANK", "0")
        self.local_size = _integer(environment, "LOCAL_WORLD_SIZE", "1")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"RANK {self.rank} and WORLD_SIZE {self.world_size} in the environment: start with torchrun")
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if nccl and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        try:
            with _rank_lost_errors():
                dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
        except ValueError as error:
            raise InputError(f"MASTER_ADDR or MASTER_PORT in the environment: {error}; start with torchrun") from error
        backend = "NCCL, or Gloo on a CPU" if nccl else "Gloo"
        self.launcher = f"{counted(self.world_size, 'rank')} of torchrun (RANK, WORLD_SIZE are set), gradients over {backend}"

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0)

    def _share(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None, dst=0)
        return values


class _CollectiveError(InputError):
    """An error that all ranks raise together."""


def _integer(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"{name} in the environment is {value!r}, expected a number: start with torchrun") from error


@contextmanager
def _rank_lost_errors() -> Iterator[None]:
    """Raise ``RankLost`` for the RuntimeError with which both libraries report a lost rank."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(f"lost contact with the other ranks ({' '.join(str(error).split())[:200]})") from error

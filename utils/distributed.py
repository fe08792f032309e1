"""The worker processes of one run, started by horovodrun, by torchrun, or one alone; nothing else in the tree knows which.

Every worker calls the same methods in the same order. Worker 0 alone writes files and speaks to the user.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError, RankLost, print_error
from utils.pack import pack, unpack
from utils.signals import killable

# A worker that dies ends the others through its closed connection and through the launcher; this only bounds honest waiting.
PATIENCE = timedelta(minutes=30)


def connect(environment: Mapping[str, str] = os.environ) -> ProcessGroup:
    """The workers of this run, chosen by what their launcher put into the environment. Use them as a context manager.

    Raises:
        InputError: horovodrun started this process, but horovod cannot be imported; mpirun did, but horovod knows no MPI; or
            the launcher's variables are no numbers.
        RankLost: the others cannot be reached.
    """
    with killable():  # the libraries wait for the other workers where no handler of ours can run
        return _workers_of(environment)


def _workers_of(environment: Mapping[str, str]) -> ProcessGroup:
    if "HOROVOD_SIZE" in environment:
        return Horovod("HOROVOD_SIZE")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if not missing:
        return TorchDistributed(environment)
    if _number(environment, "WORLD_SIZE", "1") > 1:
        raise InputError(f"WORLD_SIZE is in the environment, but {', '.join(missing)} not: start with torchrun")
    if "OMPI_COMM_WORLD_SIZE" in environment:  # mpirun, by hand or by a horovodrun that was built with MPI
        group = Horovod("OMPI_COMM_WORLD_SIZE")
        if group.world_size != _number(environment, "OMPI_COMM_WORLD_SIZE", ""):
            raise InputError("started by mpirun, but horovod was built without MPI: expected horovodrun or torchrun")
        return group
    return SingleProcess()


class ProcessGroup(ABC):
    """What workers do together.

    Attributes:
        rank, size: this worker's number and how many there are, on all hosts.
        local_rank, local_size: the same on this host.
        launcher: who started them, and how that was seen.
    """

    rank = 0
    world_size = 1
    local_rank = 0
    local_size = 1
    launcher = ""

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes files and speaks."""
        return self.rank == 0

    @abstractmethod
    def _sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over the workers."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None:
        """Replace ``tensor``, which is contiguous, by worker 0's."""

    @abstractmethod
    def _share(self, value: Any) -> Any:
        """Worker 0's ``value``, which has no tensors in it."""

    @abstractmethod
    def _gather(self, value: Any) -> list[Any]:
        """The workers' values by rank; an empty list on all but worker 0, where there is a way to spare them."""

    @abstractmethod
    def close(self) -> None:
        """Part from the others, all of which part too."""

    def average(self, tensor: Tensor) -> None:
        """Replace ``tensor``, which is contiguous, by its mean over the workers. Raises ``RankLost``."""
        if self.world_size > 1:
            with _contact():
                self._sum(tensor)
            tensor.div_(self.world_size)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each of ``tensors``, of equal shapes everywhere, by worker 0's. Raises ``RankLost``."""
        if self.world_size > 1:
            with _contact(), torch.no_grad():
                for tensor in tensors:
                    self._broadcast(tensor)

    def share(self, value: Any) -> Any:
        """Worker 0's ``value``, in which tensors may be nested; they arrive on the CPU. Raises ``RankLost``."""
        if self.world_size == 1:
            return value
        data, tensors = pack(value) if self.is_main else (b"", [])
        with _contact():
            data = self._share(data)
        if not self.is_main:
            return unpack(data, lambda tensor: self.broadcast([tensor]))
        for tensor in tensors:
            self.broadcast([tensor.cpu().contiguous()])
        return value

    def gather(self, value: Any) -> list[Any]:
        """On worker 0 the workers' values by rank, elsewhere an empty list. Raises ``RankLost``."""
        if self.world_size == 1:
            return [value]
        with _contact():
            values = self._gather(value)
        return values if self.is_main else []

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise the same ``InputError`` on all workers when their ``values`` differ, naming which and on which host."""
        message = None
        everyones = self.gather((socket.gethostname(), values))
        for rank, (host, others) in enumerate(everyones):
            different = [name for name in values if others.get(name) != values[name]]
            if message is None and different:
                message = f"worker {rank} on {host} has another {', another '.join(different)} than worker 0, expected the same"
        message = self.share(message)
        if message is not None:
            raise _AgreedError(message)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """A block in which an ``InputError`` of one worker becomes the error of all, told once and with the worker's name.

        Outside such a block a worker's error ends the others too, but only through their launcher.
        """
        if self.world_size == 1:
            yield
            return
        error: InputError | None = None
        try:
            yield
        except InputError as raised:
            error = raised
        failures = self.gather((socket.gethostname(), None if error is None else str(error)))
        agreed = self.share(_one_message(failures))
        if agreed is not None:
            raise _AgreedError(agreed) from error

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world_size == 1:
            return
        if isinstance(error, _AgreedError):
            if self.is_main:
                print_error(error)
            self.share(None)  # so that no launcher kills worker 0 before it has spoken
            sys.exit(2)
        if isinstance(error, InputError):
            print_error(f"worker {self.rank} on {socket.gethostname()}: {error}")
            sys.exit(2)
        if error is None:
            with _contact():
                self.close()


class SingleProcess(ProcessGroup):
    """One process, started by no launcher."""

    launcher = "one process: neither horovodrun's nor torchrun's variables are in the environment"

    def _sum(self, tensor: Tensor) -> None:
        """The sum of one."""

    def _broadcast(self, tensor: Tensor) -> None:
        """To nobody."""

    def _share(self, value: Any) -> Any:
        return value

    def _gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        """Nothing to part from."""


class Horovod(ProcessGroup):
    """ProcessGroup of horovodrun or mpirun."""

    def __init__(self, variable: str) -> None:
        try:
            self.hvd: Any = importlib.import_module("horovod.torch")
        except ImportError as error:
            raise InputError(
                f"{variable} in the environment says that horovodrun or mpirun started this program, but horovod cannot be "
                f"imported ({error}): install it with scripts/install_horovod.sh, or start with torchrun"
            ) from error
        with _contact():
            self.hvd.init()
        self.rank, self.world_size = self.hvd.rank(), self.hvd.size()
        self.local_rank, self.local_size = self.hvd.local_rank(), self.hvd.local_size()
        way = "NCCL" if self.hvd.nccl_built() else "Gloo" if self.hvd.gloo_built() else "MPI"
        self.launcher = f"{self.world_size} workers of horovodrun ({variable} is in the environment), gradients over {way}"

    def _sum(self, tensor: Tensor) -> None:
        self._in_place(tensor, lambda reachable: self.hvd.allreduce_(reachable, op=self.hvd.Sum))

    def _broadcast(self, tensor: Tensor) -> None:
        self._in_place(tensor, lambda reachable: self.hvd.broadcast_(reachable, root_rank=0))

    def _in_place(self, tensor: Tensor, change: Callable[[Tensor], Any]) -> None:
        """A horovod that was built without NCCL reaches only the CPU's memory."""
        if tensor.device.type == "cpu" or self.hvd.nccl_built():
            change(tensor)
        else:
            tensor.copy_(change(tensor.cpu()))

    def _share(self, value: Any) -> Any:
        return self.hvd.broadcast_object(value, root_rank=0, name="share")

    def _gather(self, value: Any) -> list[Any]:
        # Without a name Horovod takes the type's, and waits for ever where one worker has an array and another None.
        gathered: list[Any] = self.hvd.allgather_object(value, name="gather")
        return gathered

    def close(self) -> None:
        self.hvd.shutdown()


class TorchDistributed(ProcessGroup):
    """ProcessGroup of torchrun, or of anything else that sets its variables."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank, self.world_size, self.local_rank, self.local_size = (
            _number(environment, name, default)
            for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"RANK {self.rank} and WORLD_SIZE {self.world_size} in the environment: start with torchrun")
        nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        if nccl and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        try:
            with _contact():
                torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
        except ValueError as error:
            raise InputError(f"MASTER_ADDR or MASTER_PORT in the environment: {error}; start with torchrun") from error
        way = "NCCL, or Gloo on a CPU" if nccl else "Gloo"
        self.launcher = (
            f"{self.world_size} workers of torchrun (RANK and WORLD_SIZE are in the environment), gradients over {way}"
        )

    def _sum(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        torch.distributed.broadcast(tensor, src=0)

    def _share(self, value: Any) -> Any:
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size if self.is_main else []
        torch.distributed.gather_object(value, values if self.is_main else None, dst=0)
        return values

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class _AgreedError(InputError):
    """An error that every worker raises at the same place."""


def _one_message(failures: list[tuple[str, str | None]]) -> str | None:
    """What to tell of the workers' (host, message): the message alone when they all have it, the first one's otherwise."""
    failed = [(rank, host, message) for rank, (host, message) in enumerate(failures) if message is not None]
    if not failed:
        return None
    rank, host, message = failed[0]
    if len(failed) == len(failures) and {other for _, _, other in failed} == {message}:
        return message
    return f"worker {rank} on {host}: {message}"


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    value = environment.get(name, default)
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"{name} in the environment is {value!r}, expected a number: start with torchrun") from error


@contextmanager
def _contact() -> Iterator[None]:
    """Both libraries tell of a lost worker by a RuntimeError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(f"lost contact with the other workers ({' '.join(str(error).split())[:200]})") from error

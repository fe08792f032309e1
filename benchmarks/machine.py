"""Time, peak memory, and the machine's fastest matrix product."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import PrepackedLinear, can_prepack, return_freed_memory

CPU = torch.device("cpu")
CPU_SHAPES = [(1024, 768, 3072), (2048, 3072, 768), (2048, 1024, 4096), (4096, 4096, 4096)]  # rows, in, out
GPU_SHAPES = [(8192, 8192, 8192), (32768, 4096, 4096)]


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns in a fresh interpreter, where nothing has been allocated or loaded yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call, function, *arguments).result()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    multiprocessing.set_start_method(None, force=True)  # start loader workers as the programs do, not by "spawn"
    return function(*arguments)


@contextmanager
def timing(seconds: Counter[str], name: str, device: torch.device = CPU) -> Iterator[None]:
    """Add the seconds within the context, the work given to ``device`` included, to ``seconds[name]``; also a decorator."""
    _synchronize(device)
    started = time.perf_counter()
    yield
    _synchronize(device)
    seconds[name] += time.perf_counter() - started


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Return the seconds that ``work`` takes, the work it gives to ``device`` included."""
    seconds: Counter[str] = Counter()
    with timing(seconds, "", device):
        work()
    return seconds[""]


@torch.no_grad()
def fastest_product(dtype: torch.dtype, device: torch.device) -> float:
    """Return the most floating-point operations per second of any matrix product in six seconds, plain or prepacked."""
    products: list[tuple[float, Callable[[], Tensor]]] = []
    for rows, width, out in CPU_SHAPES if device.type == "cpu" else GPU_SHAPES:
        layer = nn.Linear(width, out, bias=False, device=device)
        values, operations = torch.randn(rows, width, device=device).to(dtype), 2.0 * rows * width * out
        products.append((operations, partial(F.linear, values, layer.weight.to(dtype))))
        if device.type == "cpu" and can_prepack(dtype):
            products.append((operations, partial(PrepackedLinear(layer, dtype), values)))
    best, until = 0.0, time.perf_counter() + 6
    while time.perf_counter() < until:
        best = max(best, *(operations / seconds_of(product, device) for operations, product in products))
    return best


def start_memory_peak(device: torch.device) -> int:
    """Reset the peak; return the bytes in use now, of the device's memory on a GPU, otherwise of this process."""
    gc.collect()
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return _of_this_process("VmRSS")


def memory_peak(device: torch.device) -> int:
    """Return the most bytes in use since ``start_memory_peak``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_this_process("VmHWM")


def _of_this_process(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """Return the name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor()

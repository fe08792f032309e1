"""What the machine can do, and what a process takes of it: matrix products a second, and the peak of memory."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import PrepackedLinear, can_prepack, return_freed_memory

CPU_SHAPES = [(1024, 768, 3072), (2048, 3072, 768), (2048, 1024, 4096), (4096, 4096, 4096)]  # rows, in, out
GPU_SHAPES = [(8192, 8192, 8192), (32768, 4096, 4096)]


@torch.no_grad()
def fastest_product(dtype: torch.dtype, device: torch.device, seconds: float = 6.0) -> float:
    """The most floating-point operations a second of any matrix product among some shapes, plain or with packed weights."""
    products: list[tuple[float, Callable[[], Tensor]]] = []
    for rows, width, out in CPU_SHAPES if device.type == "cpu" else GPU_SHAPES:
        layer = nn.Linear(width, out, bias=False, device=device)
        values, weight = torch.randn(rows, width, device=device).to(dtype), layer.weight.to(dtype)
        products.append((2.0 * rows * width * out, lambda values=values, weight=weight: F.linear(values, weight)))
        if device.type == "cpu" and can_prepack(dtype):
            packed = PrepackedLinear(layer, dtype)
            products.append((2.0 * rows * width * out, lambda values=values, packed=packed: packed(values)))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for operations, product in products:
            started = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, operations / (time.perf_counter() - started))
    return best


def start_memory_peak(device: torch.device) -> int:
    """Begin to watch for the peak; returns the bytes in use now, of the device's memory on a GPU, else of this process."""
    gc.collect()
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    return _of_this_process("VmRSS")


def memory_peak(device: torch.device) -> int:
    """The most bytes in use since ``start_memory_peak``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_this_process("VmHWM")


def _of_this_process(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def describe(device: torch.device) -> str:
    """The name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())

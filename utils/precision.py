"""Devices and mixed precision; the only module that knows autocast and loss scaling."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from utils.errors import InputError, counted
from utils.options import PrecisionName

LOGGER = logging.getLogger(__name__)
DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Return the device that option ``device`` means for rank ``local_rank`` of ``local_size`` on this host.

    With auto or cuda each rank uses a separate GPU, which also becomes torch's current device.

    Raises:
        InputError: the device is not available, or there are fewer GPUs than ranks.
    """
    if name == "auto":
        mps = local_size == 1 and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_size > count:
            raise InputError(f"{local_size} ranks on a host with {counted(count, 'GPU')}, expected a GPU each, or --device cpu")
        name = f"cuda:{local_rank}"
    elif local_size > 1 and name not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} with {local_size} ranks on this host, expected auto, cpu or cuda")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used on this machine, expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:  # by default each rank would start a thread per core
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    return device


def choose_precision(precision: str | None, fp16: bool, device: torch.device, option: str = "precision") -> PrecisionName:
    """Return what options ``precision`` (or another ``option`` with such values) and ``fp16`` mean on ``device``.

    Raises:
        InputError: fp16 was asked for by name on another device than CUDA, where it is slow and not tested.
    """
    if precision is None:
        if fp16 and device.type != "cuda":
            LOGGER.warning("fp16 means half precision on a CUDA device; %s computes in fp32", device.type)
        return "fp16" if fp16 and device.type == "cuda" else "fp32"
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"{option} fp16 needs a CUDA device, this run is on {device.type}: expected fp32, bf16 or auto")
    assert precision in DTYPES
    return precision


class Precision:
    """The arithmetic of a run: an autocast context and, with fp16, a gradient scaler.

    Attributes:
        dtype: of the encoder's matrix products.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = name
        self.dtype = DTYPES[name]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the encoder runs; weights stay in fp32."""
        return nullcontext() if self.name == "fp32" else torch.autocast(self.device.type, self.dtype)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that computes in fp32 within ``Precision.autocast``."""
    return torch.autocast(device.type, enabled=False)


def _cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has AMX tiles or AVX-512 BF16; False if this torch cannot tell."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)

"""Less memory between the forward and the backward pass, and between passes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor


@contextmanager
def forgotten(tensor: Tensor, repeat: Callable[[], Tensor]) -> Iterator[None]:
    """Operations inside do not keep ``tensor`` for their backward pass; they call ``repeat`` there to have it again."""
    storage = tensor.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage().data_ptr() == storage else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else repeat().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def give_back_memory() -> None:
    """Return to the system what was freed; glibc keeps holes of megabytes between what is still in use, for no further use."""
    with suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)

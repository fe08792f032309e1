"""A value as bytes and the tensors in it apart, so that these can be sent one by one and never lie in memory twice."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pack(value: Any) -> tuple[bytes, list[Tensor]]:
    """The bytes of ``value`` without its tensors, and the tensors in the order in which ``unpack`` asks for them."""
    buffer, tensors = io.BytesIO(), []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, Tensor):
                return None
            tensors.append(item.detach())
            return tuple(item.shape), item.dtype

    Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue(), tensors


def unpack(data: bytes, receive: Callable[[Tensor], None]) -> Any:
    """What ``pack`` was given in another process of this run; ``receive`` fills empty tensors on the CPU, in their order."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, form: Any) -> Tensor:
            tensor = torch.empty(form[0], dtype=form[1])
            receive(tensor)
            return tensor

    return Unpickler(io.BytesIO(data)).load()

"""Linear layers whose weights can be laid out once for many products, as the CPU's matrix library (oneDNN) likes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory import give_back_memory

ROWS_EXPECTED = 1024  # for which oneDNN chooses a layout; other numbers of rows are computed as well
FEWEST_WEIGHTS = 1 << 18  # with fewer, products are too short to gain by packing
# A kernel is compiled for each number of rows and kept, by oneDNN and by torch, up to these numbers at their first product.
# Without them it is 1,024, half a gigabyte; chunks have some dozens of sizes, of four shapes of weights.
for cache_capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache_capacity, "256")


class Packed(NamedTuple):
    """Weights in oneDNN's own layout, which no other operation reads, and the bias, both in the type to compute in."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed:
        """Copies of ``weight`` (out, in) and ``bias`` (out,)."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS_EXPECTED)
        return cls(packed, None if bias is None else bias.detach().to(dtype))

    def product(self, rows: Tensor, *, gelu: bool = False) -> Tensor:
        """(…, in) → (…, out), W x + b or GELU of it in one go."""
        how, algorithm = ("gelu", "none") if gelu else ("none", None)
        return torch.ops.mkldnn._linear_pointwise(rows.to(self.weight.dtype), self.weight, self.bias, how, [], algorithm)


class Linear(nn.Linear):
    """W x + b, or the erf form of GELU of it; ``packed`` is used, while there is one, where no gradient is wanted."""

    packed: Packed | None = None

    def forward(self, rows: Tensor, *, gelu: bool = False) -> Tensor:
        """(…, in) → (…, out)."""
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed.product(rows, gelu=gelu)
        product = super().forward(rows)
        return F.gelu(product) if gelu else product


@contextmanager
def packed_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Until the context ends, large ``Linear`` layers of ``model`` compute without gradient in ``dtype``, from packed copies.

    Weights must not change inside. Nothing happens to a model that is not on a CPU, or where torch has no such products.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, Linear)]
    layers = [layer for layer in linear if layer.weight.device.type == "cpu" and layer.weight.numel() >= FEWEST_WEIGHTS]
    try:
        for layer in layers if layers and _can_pack(dtype) else ():
            layer.packed = Packed.of(layer.weight, layer.bias, dtype)
        yield
    finally:
        if any(layer.packed for layer in layers):
            for layer in layers:
                layer.packed = None
            give_back_memory()


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU has the operations, which are not part of torch's public interface."""
    rows, weight, bias = torch.arange(6.0).view(2, 3) - 2, torch.arange(12.0).view(4, 3) / 8, torch.arange(4.0)
    try:
        product = Packed.of(weight, bias, dtype).product(rows, gelu=True)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(product.float(), F.gelu(F.linear(rows, weight, bias)), rtol=0.02, atol=0.02)

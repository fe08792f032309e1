"""CPU optimisations of the encoder, enabled from outside; results do not change.

The network's modules do not know of them: forwards are replaced on the instances, and restored afterwards.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.layers import Intermediate, Layer, SelfAttention

ROWS_EXPECTED = 1024  # oneDNN chooses a layout for this number of rows; it computes any other number as well
MIN_WEIGHTS = 1 << 18  # products with smaller matrices are too short to gain from prepacking
# oneDNN and torch compile a kernel per number of rows and keep this many of them; the limit is read at the first product. The
# default of 1,024 costs half a gigabyte; chunks have some dozens of sizes, for four shapes of weights.
for cache_capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache_capacity, "256")


class PrepackedLinear:
    """W x + b, or GELU of it, from copies of the weights in oneDNN's own layout.

    Args:
        layer: the layer (in → out) to copy.
        dtype: the type to compute in.
        gelu: whether to fuse the erf form of GELU.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, *, gelu: bool = False) -> None:
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), ROWS_EXPECTED)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.activation: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], None)

    def __call__(self, rows: Tensor) -> Tensor:
        """(…, in) → (…, out), without gradient."""
        return torch.ops.mkldnn._linear_pointwise(rows.to(self.dtype), self.weight, self.bias, *self.activation)


@contextmanager
def packed_for_inference(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the context, large linear layers of ``model`` compute in ``dtype`` from prepacked copies of their weights.

    Inside, weights must not change and no gradient can be taken. No-op for a model that is not on a CPU, or if torch has
    no prepacked products.
    """
    fused = {id(module.dense): module for module in model.modules() if isinstance(module, Intermediate)}
    swapped: list[nn.Module] = []
    try:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu" and layer.weight.numel() >= MIN_WEIGHTS:
                if not can_prepack(dtype):
                    break
                target = fused.get(id(layer), layer)
                target.forward = PrepackedLinear(layer, dtype, gelu=target is not layer)  # type: ignore[method-assign]
                swapped.append(target)
        yield
    finally:
        for module in swapped:
            del module.forward
        if swapped:
            return_freed_memory()


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch has prepacked products on this CPU; they are not part of torch's public interface."""
    layer = nn.utils.skip_init(nn.Linear, 3, 4)  # without drawing random numbers, which would change dropout
    layer.weight.data = torch.arange(12.0).view(4, 3) / 8
    layer.bias.data = torch.arange(4.0)
    rows = torch.arange(6.0).view(2, 3) - 2
    try:
        product = PrepackedLinear(layer, dtype, gelu=True)(rows)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(product.float(), F.gelu(layer(rows)), rtol=0.02, atol=0.02)


def recompute_in_backward(model: nn.Module) -> None:
    """Make the layers of ``model`` repeat GELU, and on a CPU attention with dropout, in the backward pass.

    Otherwise autograd keeps (B, N, intermediate) and (B, A, N, N) per layer. Gradients are the same to the bit.
    """
    for module in model.modules():
        if isinstance(module, Layer):
            module.forward = partial(_recomputing_gelu, module)  # type: ignore[method-assign]
        elif isinstance(module, SelfAttention):
            module.attend = partial(_recomputing_attention, module)  # type: ignore[method-assign]


def _recomputing_gelu(layer: Layer, hidden: Tensor, mask: Tensor | None, *, cls_only: bool = False) -> Tensor:
    """``Layer.forward`` that does not keep the output of GELU."""
    if not torch.is_grad_enabled():
        return Layer.forward(layer, hidden, mask, cls_only=cls_only)
    attended = layer.attention(hidden[:, :1] if cls_only else hidden, hidden, mask)
    wide = layer.intermediate.dense(attended)
    active = F.gelu(wide)
    with recomputed(active, partial(F.gelu, wide.detach())):
        return layer.output(active, attended)


def _recomputing_attention(module: SelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``SelfAttention.attend`` that does not keep the attention; torch keeps it only on a CPU and with dropout."""
    attend = partial(SelfAttention.attend, module)
    if torch.is_grad_enabled() and module.training and module.dropout and query.device.type == "cpu":
        return checkpoint(attend, query, key, value, mask, use_reentrant=False)
    return attend(query, key, value, mask)


@contextmanager
def recomputed(tensor: Tensor, repeat: Callable[[], Tensor]) -> Iterator[None]:
    """Operations inside do not save ``tensor`` for their backward pass; they call ``repeat`` there to compute it again."""
    storage = tensor.untyped_storage().data_ptr()

    def save(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage().data_ptr() == storage else saved

    def restore(saved: Tensor | torch.Size) -> Tensor:
        return saved if isinstance(saved, Tensor) else repeat().view(saved)

    with torch.autograd.graph.saved_tensors_hooks(save, restore):
        yield


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps holes of megabytes that nothing else can use."""
    with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)

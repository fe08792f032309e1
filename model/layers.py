"""The transformer block of BERT, and the pooler. Module names are those of the published checkpoints.

Shapes: B pairs of a chunk, N joined length (words then regions, padded), Q query rows (N, or 1 for [CLS] alone),
H hidden width, A heads, D = H / A head width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import UniterConfig
from model.linear import Linear
from model.memory import forgotten
from utils.precision import full_precision

LAYER_NORM_EPS = 1e-12


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, queries: Tensor, hidden: Tensor, mask: Tensor | None, *, recompute: bool) -> Tensor:
        """Attend from ``queries`` (B, Q, H) to ``hidden`` (B, N, H) where ``mask`` (B, 1, 1, N) is true → (B, Q, H)."""
        attend = partial(F.scaled_dot_product_attention, dropout_p=self.dropout if self.training else 0.0)
        if recompute and self.training and self.dropout and hidden.device.type == "cpu":  # there it keeps all (B, A, Q, N)
            attend = partial(checkpoint, attend, use_reentrant=False)
        context = attend(self._split(self.query(queries)), self._split(self.key(hidden)), self._split(self.value(hidden)), mask)
        return context.transpose(1, 2).flatten(2)  # (B, A, Q, D) → (B, Q, H)

    def scores(self, hidden: Tensor) -> Tensor:
        """S = Q Kᵀ / √D before any softmax, in fp32: (B, N, H) → (B, A, N, N)."""
        with full_precision(hidden.device):  # packed weights would not be, hence not self.query(hidden)
            hidden = hidden.float()
            queries, keys = (self._split(F.linear(hidden, layer.weight, layer.bias)) for layer in (self.query, self.key))
            return queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, H) → (B, A, N, D)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(W x))."""

    def __init__(self, width: int, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:
        """``rows`` (B, Q, width) and ``residual`` (B, Q, H) → (B, Q, H)."""
        return self.LayerNorm(residual + self.dropout(self.dense(rows)))


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = AddNorm(config.hidden_size, config)

    def forward(self, queries: Tensor, hidden: Tensor, mask: Tensor | None, *, recompute: bool) -> Tensor:
        """(B, Q, H), (B, N, H), (B, 1, 1, N) → (B, Q, H)."""
        return self.output(self.self(queries, hidden, mask, recompute=recompute), queries)


class Intermediate(nn.Module):
    """The widening half of the feed-forward layer, with the erf form of GELU."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, rows: Tensor, *, recompute: bool) -> tuple[Tensor, AbstractContextManager[None]]:
        """(B, Q, H) → (B, Q, intermediate), and the context to use it in, which does not keep it if ``recompute``."""
        if not recompute:
            return self.dense(rows, gelu=True), nullcontext()
        wide = self.dense(rows)
        active = F.gelu(wide)
        return active, forgotten(active, partial(F.gelu, wide.detach()))


class Block(nn.Module):
    """One encoder layer."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.intermediate_size, config)

    def forward(self, hidden: Tensor, mask: Tensor | None, *, cls_only: bool = False, recompute: bool = False) -> Tensor:
        """(B, N, H) → (B, N, H), or (B, 1, H) for the [CLS] row alone, whose value is the same.

        With ``recompute`` the backward pass repeats GELU, and on a CPU attention, instead of keeping what they made.
        """
        rows = self.attention(hidden[:, :1] if cls_only else hidden, hidden, mask, recompute=recompute)
        active, context = self.intermediate(rows, recompute=recompute)
        with context:
            return self.output(active, rows)


class Pooler(nn.Module):
    """tanh(W h_[CLS])."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, cls: Tensor) -> Tensor:
        """(pairs, H) → (pairs, H)."""
        return torch.tanh(self.dense(cls))

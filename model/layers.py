"""The transformer layer of BERT and the pooler. Module names are those of the published checkpoints.

Shapes: B pairs of a chunk, N joined length (words then regions, padded), Q query rows (N, or 1 for [CLS] alone),
H hidden width, A heads, D = H / A head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import UniterConfig
from utils.precision import full_precision

LAYER_NORM_EPS = 1e-12


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, queries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from ``queries`` (B, Q, H) to ``hidden`` (B, N, H) where ``mask`` (B, 1, 1, N) is true → (B, Q, H)."""
        query, key, value = self.split(self.query(queries)), self.split(self.key(hidden)), self.split(self.value(hidden))
        context = self.attend(query, key, value, mask)  # (B, A, Q, D)
        return context.transpose(1, 2).flatten(2)  # (B, Q, H)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax(Q Kᵀ / √D) V with dropout on the attention: (B, A, Q, D), (B, A, N, D) twice → (B, A, Q, D)."""
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=self.dropout if self.training else 0.0)

    def scores(self, hidden: Tensor) -> Tensor:
        """Q Kᵀ / √D before any softmax, in fp32 whatever ``forward`` computes in: (B, N, H) → (B, A, N, N)."""
        with full_precision(hidden.device):
            query, key = (self.split(F.linear(hidden.float(), layer.weight, layer.bias)) for layer in (self.query, self.key))
            return query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])

    def split(self, rows: Tensor) -> Tensor:
        """Split the width into heads: (B, N, H) → (B, A, N, D)."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(W x))."""

    def __init__(self, width: int, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:
        """(B, Q, width), (B, Q, H) → (B, Q, H)."""
        return self.LayerNorm(residual + self.dropout(self.dense(rows)))


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = AddNorm(config.hidden_size, config)

    def forward(self, queries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(B, Q, H), (B, N, H), (B, 1, 1, N) → (B, Q, H)."""
        return self.output(self.self(queries, hidden, mask), queries)


class Intermediate(nn.Module):
    """The widening half of the feed-forward layer, with the erf form of GELU."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, Q, H) → (B, Q, intermediate)."""
        return F.gelu(self.dense(rows))


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward (Devlin et al. 2019)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.intermediate_size, config)

    def forward(self, hidden: Tensor, mask: Tensor | None, *, cls_only: bool = False) -> Tensor:
        """(B, N, H) → (B, N, H), or (B, 1, H) for the [CLS] row alone, which has the same value."""
        attended = self.attention(hidden[:, :1] if cls_only else hidden, hidden, mask)
        return self.output(self.intermediate(attended), attended)


class Pooler(nn.Module):
    """tanh(W h_[CLS])."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, cls: Tensor) -> Tensor:
        """(pairs, H) → (pairs, H)."""
        return torch.tanh(self.dense(cls))

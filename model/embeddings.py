"""Text and region embeddings, without their dropout, which is applied per pair after joining.

Shapes: rows are the concatenated tokens or regions of all items (data/batch.py); H hidden width; F feature width.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.config import UniterConfig
from model.layers import LAYER_NORM_EPS


class TextEmbeddings(nn.Module):
    """LayerNorm(word + position + type 0) (Chen et al. 2020, section 3.1)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``tokens`` and ``positions`` (rows,) → (rows, H)."""
        words = self.word_embeddings(tokens) + self.position_embeddings(positions)
        return self.LayerNorm(words + self.token_type_embeddings.weight[0])

    @property
    def image_type(self) -> Tensor:
        """The embedding of token type 1 (H,), which marks regions."""
        return self.token_type_embeddings.weight[1]


class ImageEmbeddings(nn.Module):
    """LayerNorm(LayerNorm(W_f f) + LayerNorm(W_p p) + type 1) (Chen et al. 2020, section 3.1)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.img_linear = nn.Linear(config.img_dim, config.hidden_size)
        self.img_layer_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_layer_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.pos_linear = nn.Linear(7, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, features: Tensor, boxes: Tensor, image_type: Tensor) -> Tensor:
        """``features`` (rows, F) of any floating type, ``boxes`` (rows, 7), ``image_type`` (H,) → (rows, H)."""
        regions = self.img_layer_norm(self.img_linear(features.to(self.img_linear.weight.dtype)))
        return self.LayerNorm(regions + self.pos_layer_norm(self.pos_linear(boxes)) + image_type)

"""UNITER: embed each text and image once, then encode the pairs (Chen et al. 2020, section 3.1).

Shapes: P pairs, B pairs of a chunk, N joined length (words then regions), H hidden width, A heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import PairBatch, Ragged
from model.chunks import Chunk, ChunkSize, chunks
from model.config import UniterConfig
from model.embeddings import ImageEmbeddings, TextEmbeddings
from model.layers import Layer, Pooler


class Embedded(NamedTuple):
    """Embedded texts and images of a batch, rows (…, H), before dropout."""

    texts: Ragged
    images: Ragged


class MapRequest(NamedTuple):
    """The attention maps to return: of these pairs (indices into ``pairs``), in these layers (counted from 0)."""

    pairs: Sequence[int]
    layers: Sequence[int]


NO_MAPS = MapRequest((), ())


class Encoded(NamedTuple):
    """The output of the encoder.

    Attributes:
        cls: (P, H), [CLS] of the last layer.
        maps: per requested layer, a tensor (A, N, N) per requested pair, in the order of the request: Q Kᵀ / √D before the
            softmax, fp32, unpadded, words before regions.
    """

    cls: Tensor
    maps: dict[int, list[Tensor]]


class UniterEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, chunk: Chunk, request: MapRequest, *, checkpointing: bool
    ) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """(B, N, H) → [CLS] (B, H) and, by (layer, pair), the maps of the requested pairs in this chunk."""
        wanted = [(row, pair) for row, pair in enumerate(chunk.members.tolist()) if pair in request.pairs]
        maps: dict[tuple[int, int], Tensor] = {}
        for number, layer in enumerate(self.layer):
            if wanted and number in request.layers:
                assert isinstance(layer, Layer)
                scores = layer.attention.self.scores(hidden[[row for row, _ in wanted]])  # (wanted, A, N, N)
                for (row, pair), score in zip(wanted, scores, strict=True):
                    length = int(chunk.lengths[row])
                    maps[number, pair] = score[:, :length, :length]
            run = partial(layer, cls_only=number == len(self.layer) - 1)
            if checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(run, hidden, chunk.mask, use_reentrant=False)
            else:
                hidden = run(hidden, chunk.mask)
        return hidden[:, 0], maps


class UniterModel(nn.Module):
    """The encoder of (text, image) pairs. It knows nothing of losses, ranking or precision."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.img_embeddings = ImageEmbeddings(config)
        self.encoder = UniterEncoder(config)
        self.pooler = Pooler(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, batch: PairBatch) -> Embedded:
        """Embed each distinct text and image of ``batch`` once."""
        positions = batch.tokens.positions().to(batch.tokens.rows.device)
        texts = self.embeddings(batch.tokens.rows, positions)
        images = self.img_embeddings(batch.features.rows, batch.boxes, self.embeddings.image_type)
        return Embedded(Ragged(texts, batch.tokens.lengths), Ragged(images, batch.features.lengths))

    def encode(
        self, embedded: Embedded, pairs: Tensor, size: ChunkSize, request: MapRequest = NO_MAPS, *, checkpointing: bool = False
    ) -> Encoded:
        """Encode ``pairs`` (P, 2), indices into the embedded texts and images, in chunks of at most ``size``.

        The last layer computes [CLS] alone. Maps are computed beside their layer, so that requesting one changes nothing else.
        The embeddings' dropout is applied here, so that each pair has its own.

        Raises:
            ValueError: a map of a layer that does not exist is requested.
        """
        for layer in request.layers:
            if not 0 <= layer < self.config.num_hidden_layers:
                raise ValueError(f"map of layer {layer} requested, expected 0 to {self.config.num_hidden_layers - 1}")
        table = torch.cat([embedded.texts.rows, embedded.images.rows])
        cls, members = [], []
        maps: dict[tuple[int, int], Tensor] = {}
        for chunk in chunks(embedded.texts.lengths, embedded.images.lengths, pairs, size):
            chunk = chunk.to(table.device)
            joined = F.embedding(chunk.rows, table)  # (B, N, H)
            joined = F.dropout(joined, self.config.hidden_dropout_prob, self.training)
            chunk_cls, chunk_maps = self.encoder(joined, chunk, request, checkpointing=checkpointing)
            cls.append(chunk_cls)
            members.append(chunk.members)
            maps |= chunk_maps
        order = torch.cat(members).argsort().to(table.device)  # back from the chunks' order to that of ``pairs``
        by_layer = {layer: [maps[layer, pair] for pair in request.pairs] for layer in request.layers}
        return Encoded(torch.cat(cls)[order], by_layer)

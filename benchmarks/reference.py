"""The plain implementation to compare with: fp32, eager, one padded sequence per pair.

Every pair is padded to the longest of its batch and embedded from scratch, every layer computes all its rows, attention and its
maps are written out in full, and an image is decoded, with all its fields, each time it is used. It shares with the program the
weights, in modules that treat every row alike (embeddings, linear layers, residual and LayerNorm), the hinge and the IAIS loss.

Shapes: P pairs, L longest text, K most regions, N = L + K, F feature width, A heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgpack
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.split import RetrievalSplit
from model.iais import REGULARISERS, Modality, PairAttention
from model.layers import Layer
from model.retrieval import RetrievalModel, hinge


class Padded(NamedTuple):
    """P pairs: tokens (P, L), features (P, K, F), boxes (P, K, 7), and the real lengths, words and regions (P,), on the CPU."""

    tokens: Tensor
    features: Tensor
    boxes: Tensor
    words: Tensor
    regions: Tensor

    def to(self, device: torch.device) -> Padded:
        """Move everything but the lengths."""
        return Padded(*(field.to(device) for field in self[:3]), *self[3:])


def decode(record: memoryview) -> tuple[Tensor, Tensor]:
    """Return the features (K, F) and boxes (K, 7) of an image, in fp32."""
    arrays = {
        name: np.frombuffer(field[b"data"], field[b"type"]).reshape(field[b"shape"]).copy()
        for name, field in msgpack.unpackb(bytes(record), raw=True).items()
    }
    features, corners = (torch.from_numpy(arrays[name]).float() for name in (b"features", b"norm_bb"))
    return features, torch.cat([corners, corners[:, 4:5] * corners[:, 5:]], dim=1)


def read(split: RetrievalSplit, pairs: list[tuple[str, str]]) -> Padded:
    """Return the batch of these (text id, image name)."""
    database = split.text_db
    texts = [torch.tensor([database.cls_id, *database[text].input_ids.tolist(), database.sep_id]) for text, _ in pairs]
    features, boxes = zip(*(decode(split.image_db._store.get(name)) for _, name in pairs), strict=True)
    padded = (nn.utils.rnn.pad_sequence(items, batch_first=True) for items in (texts, features, boxes))
    return Padded(*padded, *(torch.tensor([len(item) for item in items]) for items in (texts, boxes)))


class Reference:
    """UNITER with the weights of ``model``, written out."""

    def __init__(self, model: RetrievalModel) -> None:
        self.model = model

    def __call__(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Return scores (P,) and S = Q Kᵀ / √D of the last layer, (P, A, N, N)."""
        uniter = self.model.uniter
        longest, most = batch.tokens.shape[1], batch.features.shape[1]
        real = torch.cat([torch.arange(longest) < batch.words[:, None], torch.arange(most) < batch.regions[:, None]], dim=1)
        mask = (1 - real[:, None, None].float().to(batch.tokens.device)) * -10000
        texts = uniter.embeddings(batch.tokens, torch.arange(longest, device=batch.tokens.device))
        images = uniter.img_embeddings(batch.features, batch.boxes, uniter.embeddings.image_type)
        hidden = F.dropout(torch.cat([texts, images], dim=1), self.model.config.hidden_dropout_prob, self.model.training)
        maps = hidden
        for layer in uniter.encoder.layer:
            hidden, maps = self._layer(layer, hidden, mask)
        return self.model.rank_output(torch.tanh(uniter.pooler.dense(hidden[:, 0]))).squeeze(1), maps

    def _layer(self, layer: Layer, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.attention.self
        query, key, value = (
            project(hidden).unflatten(2, (attention.heads, -1)).permute(0, 2, 1, 3)
            for project in (attention.query, attention.key, attention.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        attended = F.dropout((scores + mask).softmax(dim=-1), attention.dropout, self.model.training) @ value
        hidden = layer.attention.output(attended.permute(0, 2, 1, 3).contiguous().flatten(2), hidden)
        wide = layer.intermediate.dense(hidden)
        return layer.output(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))), hidden), scores

    @torch.no_grad()
    def mine(self, batch: Padded) -> Tensor:
        """Return the scores of the candidates of one anchor, (P,)."""
        self.model.eval()
        return self(batch)[0]

    def loss(self, batch: Padded, candidates: Tensor, hard: int, regulariser: str, modality: Modality) -> Tensor:
        """Return the mean hinge on the ``hard`` best-scored negatives plus the alignment loss of the positive, pair 0."""
        self.model.train()
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), candidates[1:].topk(hard).indices.cpu() + 1])
        chosen = Padded(*(field[kept] for field in batch))
        scores, maps = self(chosen)
        words, regions, longest = int(chosen.words[0]), int(chosen.regions[0]), chosen.tokens.shape[1]
        real = [*range(words), *range(longest, longest + regions)]
        positive = PairAttention.of_map(maps[0][:, real][:, :, real], words)
        return hinge(scores[None], 0.2).mean() + REGULARISERS[regulariser](positive, modality)

    @torch.no_grad()
    def evaluate(
        self, split: RetrievalSplit, texts: list[str], images: list[str], batch_size: int, device: torch.device
    ) -> Tensor:
        """Return scores (texts, images), computed one text at a time with its images in batches, each decoded again."""
        self.model.eval()
        firsts = range(0, len(images), batch_size)
        batches = [[(text, name) for name in images[first : first + batch_size]] for text in texts for first in firsts]
        return torch.cat([self(read(split, batch).to(device))[0] for batch in batches]).unflatten(0, (len(texts), -1))

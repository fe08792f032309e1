"""The same work done in the straightforward way, to compare with: fp32, eager, one padded sequence for each pair.

Every pair is padded to the longest of its batch and embedded anew, every layer computes all its rows, attention and its maps
are written out in full, and an image is decoded again, all its fields, each time that it is met. Written from the equations;
of the package it takes the weights, the hinge, the alignment loss and LMDB's records.

Shapes: P pairs, L longest text, K most regions, N = L + K, A heads, D head width.
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
from model.retrieval import RetrievalModel, hinge


class Padded(NamedTuple):
    """P pairs: tokens (P, L), features (P, K, F), boxes (P, K, 7), and how many of L and K are real, (P,) each."""

    tokens: Tensor
    features: Tensor
    boxes: Tensor
    words: Tensor
    regions: Tensor

    def of(self, pairs: Tensor) -> Padded:
        """Some of the pairs."""
        return Padded(*(field[pairs] for field in self))


def decode(record: memoryview) -> tuple[Tensor, Tensor]:
    """Features (K, F) and boxes (K, 7) of an image, in fp32."""

    def array(field: dict[bytes, object]) -> object:
        if b"nd" not in field:
            return field
        return np.frombuffer(field[b"data"], np.dtype(field[b"type"])).reshape(field[b"shape"]).copy()  # type: ignore[call-overload]

    fields = msgpack.unpackb(bytes(record), raw=True, object_hook=array)
    features, corners = (torch.from_numpy(fields[name]).float() for name in (b"features", b"norm_bb"))
    return features, torch.cat([corners, corners[:, 4:5] * corners[:, 5:]], dim=1)


def read(source: RetrievalSplit, pairs: list[tuple[str, str]]) -> Padded:
    """The batch of these (text id, image name)."""
    database = source.text_db
    texts = [torch.tensor([database.cls_id, *database[text].input_ids.tolist(), database.sep_id]) for text, _ in pairs]
    images = [decode(source.image_db._store.get(name)) for _, name in pairs]
    pad = nn.utils.rnn.pad_sequence
    return Padded(
        pad(texts, batch_first=True),
        pad([features for features, _ in images], batch_first=True),
        pad([boxes for _, boxes in images], batch_first=True),
        torch.tensor([len(text) for text in texts]),
        torch.tensor([len(boxes) for _, boxes in images]),
    )


class Reference:
    """UNITER with the weights of ``model``, written out."""

    def __init__(self, model: RetrievalModel) -> None:
        self.weights = dict(model.named_parameters())
        self.config = model.config
        self.training = False

    def __call__(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Scores (P,), and S = Q Kᵀ / √D of the last layer, (P, A, N, N)."""
        longest, most = batch.tokens.shape[1], batch.features.shape[1]
        real = torch.cat([torch.arange(longest) < batch.words[:, None], torch.arange(most) < batch.regions[:, None]], dim=1).to(
            batch.tokens.device
        )
        mask = (1 - real[:, None, None].float()) * -10000
        hidden = self._dropout(torch.cat([self._embed_texts(batch.tokens), self._embed_images(batch)], dim=1))
        maps = hidden
        for number in range(self.config.num_hidden_layers):
            hidden, maps = self._layer(f"uniter.encoder.layer.{number}", hidden, mask)
        pooled = torch.tanh(self._linear("uniter.pooler.dense", hidden[:, 0]))
        return self._linear("rank_output", pooled).squeeze(1), maps

    def _embed_texts(self, tokens: Tensor) -> Tensor:
        name = "uniter.embeddings"
        words = F.embedding(tokens, self.weights[f"{name}.word_embeddings.weight"])
        places = self.weights[f"{name}.position_embeddings.weight"][: tokens.shape[1]]
        return self._norm(f"{name}.LayerNorm", words + places + self.weights[f"{name}.token_type_embeddings.weight"][0])

    def _embed_images(self, batch: Padded) -> Tensor:
        name = "uniter.img_embeddings"
        regions = self._norm(f"{name}.img_layer_norm", self._linear(f"{name}.img_linear", batch.features))
        boxes = self._norm(f"{name}.pos_layer_norm", self._linear(f"{name}.pos_linear", batch.boxes))
        image_type = self.weights["uniter.embeddings.token_type_embeddings.weight"][1]
        return self._norm(f"{name}.LayerNorm", regions + boxes + image_type)

    def _layer(self, name: str, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        def heads(which: str) -> Tensor:
            rows = self._linear(f"{name}.attention.self.{which}", hidden)
            return rows.unflatten(2, (self.config.num_attention_heads, -1)).permute(0, 2, 1, 3)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        attention = self._dropout((scores + mask).softmax(dim=-1))
        context = (attention @ value).permute(0, 2, 1, 3).contiguous().flatten(2)
        attended = self._dropout(self._linear(f"{name}.attention.output.dense", context))
        hidden = self._norm(f"{name}.attention.output.LayerNorm", hidden + attended)
        wide = self._linear(f"{name}.intermediate.dense", hidden)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        narrow = self._dropout(self._linear(f"{name}.output.dense", wide))
        return self._norm(f"{name}.output.LayerNorm", hidden + narrow), scores

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12)

    def _dropout(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, self.config.hidden_dropout_prob, self.training)

    @torch.no_grad()
    def mine(self, batch: Padded) -> Tensor:
        """Scores of the candidates of one anchor, (P,)."""
        self.training = False
        return self(batch)[0]

    def loss(self, batch: Padded, candidates: Tensor, hard: int, regulariser: str, modality: Modality) -> Tensor:
        """Mean hinge on the ``hard`` best-scored negatives, plus the alignment of the positive, which is pair 0."""
        self.training = True
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), candidates[1:].topk(hard).indices.cpu() + 1])
        chosen = batch.of(kept)
        scores, maps = self(chosen)
        words, regions, longest = int(chosen.words[0]), int(chosen.regions[0]), chosen.tokens.shape[1]
        real = [*range(words), *range(longest, longest + regions)]
        own = maps[0][:, real][:, :, real]
        alignment = REGULARISERS[regulariser](PairAttention.of_map(own, words), modality)
        return hinge(scores[None], 0.2).mean() + alignment

    @torch.no_grad()
    def evaluate(
        self, source: RetrievalSplit, texts: list[str], images: list[str], batch_size: int, device: torch.device
    ) -> Tensor:
        """Scores (texts, images): a text at a time, its images in batches, each decoded again."""
        self.training = False
        rows = []
        for text in texts:
            batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
            rows.append(torch.cat([self(to(read(source, [(text, name) for name in names]), device))[0] for names in batches]))
        return torch.stack(rows)


def to(batch: Padded, device: torch.device) -> Padded:
    """The batch on ``device``, but for its lengths."""
    return batch._replace(tokens=batch.tokens.to(device), features=batch.features.to(device), boxes=batch.boxes.to(device))

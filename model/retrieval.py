"""Ranking with UNITER: the head, the hinge, and which negatives are hard (Ren et al. 2021, section 4.1).

Shapes: P pairs, G groups (one anchor each) of C candidates, the positive first; H hard negatives kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import PairBatch
from model.config import UniterConfig
from model.packing import ChunkSize
from model.uniter import NO_MAPS, Embedded, MapRequest, UniterModel
from utils.precision import Precision


@dataclass(frozen=True)
class Compute:
    """How the encoder computes: where and in which arithmetic, and in chunks of which size, which changes no result."""

    precision: Precision
    chunk: ChunkSize


class Scored(NamedTuple):
    """``scores``: (P,) fp32, raw outputs of the ranking head; ``maps``: as in ``model.uniter.Encoded``."""

    scores: Tensor
    maps: dict[int, list[Tensor]]


class RetrievalModel(nn.Module):
    """UNITER with the ranking head: s(text, image) = sigmoid(score)."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.uniter = UniterModel(config)
        self.rank_output = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.rank_output.weight, std=config.initializer_range)
        nn.init.zeros_(self.rank_output.bias)

    @property
    def config(self) -> UniterConfig:
        """The architecture."""
        return self.uniter.config

    def embed(self, batch: PairBatch, compute: Compute) -> Embedded:
        """Embed each distinct text and image of ``batch`` once."""
        with compute.precision.autocast():
            return self.uniter.embed(batch)

    def score(self, embedded: Embedded, pairs: Tensor, compute: Compute, request: MapRequest = NO_MAPS) -> Scored:
        """Score ``pairs`` (P, 2) of embedded texts and images; the head computes in fp32, so that scores do not tie."""
        with compute.precision.autocast():
            encoded = self.uniter.encode(embedded, pairs, compute.chunk, request)
        return Scored(self.rank_output(self.uniter.pooler(encoded.cls.float())).squeeze(1), encoded.maps)

    def forward(self, batch: PairBatch, compute: Compute, request: MapRequest = NO_MAPS) -> Scored:
        """Embed and score the pairs of ``batch``."""
        return self.score(self.embed(batch, compute), batch.pairs, compute, request)


def hardest(scores: Tensor, count: int) -> Tensor:
    """Which candidates to keep: the positive, 0, and the ``count`` best-scored negatives. (G, C) → (G, 1 + H) indices."""
    negatives = scores[:, 1:].topk(count, dim=1).indices + 1
    return torch.cat([torch.zeros_like(negatives[:, :1]), negatives], dim=1)


def hinge(scores: Tensor, margin: float) -> Tensor:
    """max(0, margin + s⁻ - s⁺) on sigmoid scores: raw (G, 1 + H), the positive first → (G, H)."""
    probabilities = scores.sigmoid()
    return (margin + probabilities[:, 1:] - probabilities[:, :1]).clamp_min(0)

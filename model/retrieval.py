"""Ranking with UNITER: the head, the hinge loss, and the choice of hard negatives (Ren et al. 2021, section 4.1).

Shapes: P pairs, G groups (one anchor each) of C candidates, the positive first; H hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import PairBatch
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.uniter import NO_MAPS, Embedded, MapRequest, UniterModel
from utils.precision import Precision


def _no_packing(encoder: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class ComputeSettings:
    """How the encoder computes. None of it changes a result by more than rounding.

    Attributes:
        precision: the device and the arithmetic.
        chunk: bounds on what is encoded at once.
        mining: the arithmetic in which candidates are scored to mine negatives; ``precision`` if None.
        checkpointing: keep only the layers' inputs for the backward pass and compute the layers again there (Chen et al. 2016,
            arXiv 1604.06174).
        prepare: context manager in which an encoder scores many pairs in a dtype without gradient (``model/cpu.py``).
    """

    precision: Precision
    chunk: ChunkSize
    mining: Precision | None = None
    checkpointing: bool = False
    prepare: Callable[[nn.Module, torch.dtype], AbstractContextManager[None]] = _no_packing

    def for_mining(self) -> ComputeSettings:
        """The settings in which candidates are scored."""
        return replace(self, precision=self.mining or self.precision)

    def inference(self, model: RetrievalModel) -> AbstractContextManager[None]:
        """The context in which to score many pairs without gradient; weights must not change inside."""
        return self.prepare(model.uniter.encoder, self.precision.dtype)


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

    def embed(self, batch: PairBatch, compute: ComputeSettings) -> Embedded:
        """Embed each distinct text and image of ``batch`` once."""
        with compute.precision.autocast():
            return self.uniter.embed(batch)

    def score(self, embedded: Embedded, pairs: Tensor, compute: ComputeSettings, request: MapRequest = NO_MAPS) -> Scored:
        """Score ``pairs`` (P, 2) of embedded texts and images. The head computes in fp32, so that scores do not tie."""
        with compute.precision.autocast():
            encoded = self.uniter.encode(embedded, pairs, compute.chunk, request, checkpointing=compute.checkpointing)
        return Scored(self.rank_output(self.uniter.pooler(encoded.cls.float())).squeeze(1), encoded.maps)

    def forward(self, batch: PairBatch, compute: ComputeSettings, request: MapRequest = NO_MAPS) -> Scored:
        """Embed and score the pairs of ``batch``."""
        return self.score(self.embed(batch, compute), batch.pairs, compute, request)


def hardest(scores: Tensor, count: int) -> Tensor:
    """Indices (G, 1 + H) of the positive, 0, and of the ``count`` negatives with the highest ``scores`` (G, C)."""
    negatives = scores[:, 1:].topk(count, dim=1).indices + 1
    return torch.cat([torch.zeros_like(negatives[:, :1]), negatives], dim=1)


def hinge(scores: Tensor, margin: float) -> Tensor:
    """max(0, margin + s⁻ - s⁺) on sigmoid scores: raw (G, 1 + H), the positive first → (G, H)."""
    probabilities = scores.sigmoid()
    return (margin + probabilities[:, 1:] - probabilities[:, :1]).clamp_min(0)

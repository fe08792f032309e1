"""The loss of a training half: score the candidates, keep some negatives, run those again with gradient.

Shapes: G groups of C candidates, the positive first; H negatives kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.batch import Half
from model.iais import REGULARISERS, Modality, alignment_loss
from model.retrieval import Compute, RetrievalModel, hardest, hinge
from model.uniter import MapRequest


class HalfLoss(NamedTuple):
    """The loss terms of a half.

    Attributes:
        pairs: (G, 1 + H, 2) on the CPU, which of the half's texts and images were kept, the positive first.
        hinge: (G, H).
        alignment: (G,), unweighted, zero without IAIS.
        candidates: (G, C) raw scores, when mined.
    """

    pairs: Tensor
    hinge: Tensor
    alignment: Tensor
    candidates: Tensor | None


@dataclass(frozen=True)
class Objective:
    """Ranking with online hard negatives and, if ``regulariser`` is named, IAIS on the positive pairs.

    ``layers``, counted from 0, are those whose attention is aligned.
    """

    hard_neg_size: int
    margin: float
    mining: Literal["hard", "random"] = "hard"
    regulariser: str | None = None
    layers: tuple[int, ...] = ()
    modality: Literal["alternate", "L", "V"] = "alternate"

    def __call__(self, model: RetrievalModel, half: Half, compute: Compute) -> HalfLoss:
        """The loss terms of ``half``; leaves ``model`` in training mode."""
        return self.loss(model, half, compute, self.mine(model, half, compute) if self.mining == "hard" else None)

    @torch.no_grad()
    def mine(self, model: RetrievalModel, half: Half, compute: Compute) -> Tensor:
        """Score the candidates → (G, C) raw scores; leaves ``model`` in evaluation mode."""
        model.eval()
        compute = compute.for_mining()
        with model.prepared(compute):
            return model(half.batch, compute).scores.view(half.groups, -1)

    def loss(self, model: RetrievalModel, half: Half, compute: Compute, candidates: Tensor | None) -> HalfLoss:
        """The loss terms on the hardest of the candidates by their scores (G, C), or without scores on the first ones."""
        pairs = half.batch.pairs.view(half.groups, -1, 2)  # (G, C, 2)
        if candidates is not None:
            kept = hardest(candidates, self.hard_neg_size).cpu()
        else:  # neighbours come first; the others are drawn at random, so the first are as random as any
            kept = torch.arange(1 + self.hard_neg_size).expand(half.groups, -1)
        kept_pairs = pairs.gather(1, kept[:, :, None].expand(-1, -1, 2))  # (G, 1 + H, 2)
        hard = half.batch.select(kept_pairs.flatten(0, 1))
        positives = [group * kept.shape[1] for group in range(half.groups)]
        layers = self.layers if self.regulariser else ()

        model.train()
        scored = model(hard, compute, MapRequest(positives, layers))
        terms = hinge(scored.scores.view(kept.shape), self.margin)
        if not self.regulariser:
            return HalfLoss(kept_pairs, terms, terms.new_zeros(half.groups), candidates)
        modality: Modality = ("V" if half.anchor == "image" else "L") if self.modality == "alternate" else self.modality
        text_lengths = hard.tokens.lengths[hard.pairs[positives, 0]].tolist()
        alignment = [
            alignment_loss(REGULARISERS[self.regulariser], [scored.maps[layer][group] for layer in layers], length, modality)
            for group, length in enumerate(text_lengths)
        ]
        return HalfLoss(kept_pairs, terms, torch.stack(alignment), candidates)

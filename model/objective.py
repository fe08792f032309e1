"""The loss of one half of a micro-step: mine the hardest negatives, then rank and align with gradient.

Shapes: G groups (one anchor each) of C candidates, the positive first; H negatives kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.batch import AnchorBatch
from model.iais import REGULARISERS, Modality, PairAttention, mean_over_layers
from model.retrieval import ComputeSettings, RetrievalModel, hardest, hinge
from model.uniter import MapRequest


class LossTerms(NamedTuple):
    """The loss terms of an ``AnchorBatch``.

    Attributes:
        pairs: (G, 1 + H, 2) on the CPU, indices of the texts and images kept, the positive first.
        hinge: (G, H).
        alignment: (G,), unweighted; zero without a regulariser.
        candidates: (G, C) raw scores of all candidates; None if the negatives were not mined.
    """

    pairs: Tensor
    hinge: Tensor
    alignment: Tensor
    candidates: Tensor | None


@dataclass(frozen=True)
class Objective:
    """Ranking with online hard negatives and, if ``regulariser`` is named, a regulariser on the positive pairs.

    ``layers``, counted from 0, are those whose attention is regularised.
    """

    hard_neg_size: int
    margin: float
    mining: Literal["hard", "random"] = "hard"
    regulariser: str | None = None
    layers: tuple[int, ...] = ()
    modality: Literal["alternate", "L", "V"] = "alternate"

    def __call__(self, model: RetrievalModel, anchors: AnchorBatch, compute: ComputeSettings) -> LossTerms:
        """The loss terms of ``anchors``; leaves ``model`` in training mode."""
        return self.loss(model, anchors, compute, self.mine(model, anchors, compute) if self.mining == "hard" else None)

    @torch.no_grad()
    def mine(self, model: RetrievalModel, anchors: AnchorBatch, compute: ComputeSettings) -> Tensor:
        """Score all candidates without dropout → raw scores (G, C); leaves ``model`` in evaluation mode."""
        model.eval()
        compute = compute.for_mining()
        with compute.inference(model):
            return model(anchors.batch, compute).scores.view(anchors.groups, -1)

    def loss(
        self, model: RetrievalModel, anchors: AnchorBatch, compute: ComputeSettings, candidates: Tensor | None
    ) -> LossTerms:
        """The loss terms on the hardest candidates by their scores (G, C); leaves ``model`` in training mode.

        Without scores, on the first ones: neighbours come first and the others are in random order.
        """
        model.train()
        if candidates is not None:
            kept = hardest(candidates, self.hard_neg_size).cpu()  # (G, 1 + H)
        else:
            kept = torch.arange(1 + self.hard_neg_size).expand(anchors.groups, -1)
        pairs = anchors.batch.pairs.view(anchors.groups, -1, 2)  # (G, C, 2)
        kept_pairs = pairs.gather(1, kept[:, :, None].expand(-1, -1, 2))  # (G, 1 + H, 2)
        hard = anchors.batch.select(kept_pairs.flatten(0, 1))
        positives = list(range(0, len(hard.pairs), kept.shape[1]))
        layers = self.layers if self.regulariser else ()

        scored = model(hard, compute, MapRequest(positives, layers))
        terms = hinge(scored.scores.view(kept.shape), self.margin)
        if not self.regulariser:
            return LossTerms(kept_pairs, terms, terms.new_zeros(anchors.groups), candidates)
        modality: Modality = ("V" if anchors.anchor == "image" else "L") if self.modality == "alternate" else self.modality
        text_lengths = hard.tokens.lengths[hard.pairs[positives, 0]].tolist()
        alignment = [
            mean_over_layers(
                REGULARISERS[self.regulariser],
                [PairAttention.of_map(scored.maps[layer][group], length, layer) for layer in layers],
                modality,
            )
            for group, length in enumerate(text_lengths)
        ]
        return LossTerms(kept_pairs, terms, torch.stack(alignment), candidates)

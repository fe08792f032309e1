"""IAIS: Inter-modal Alignment on Intra-modal Self-attentions (Ren et al. 2021, section 3), as pure functions of attention maps.

Shapes: A heads, N joined length, L words (without [CLS] and [SEP]), K regions. A_XY attends from rows X to columns Y.
A further regulariser is one function of ``Blocks`` and an entry in ``REGULARISERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Modality = Literal["L", "V"]


class Blocks(NamedTuple):
    """Logarithms of the four head-averaged attention blocks of one pair; each row of ``exp`` sums to one.

    They are kept as logarithms because a divergence needs both, and the logarithm of an underflown average is lost.
    """

    LL: Tensor  # (L, L)
    VV: Tensor  # (K, K)
    LV: Tensor  # (L, K)
    VL: Tensor  # (K, L)

    def mirrored(self) -> Blocks:
        """The same with the modalities exchanged, so that one formula serves both."""
        return Blocks(LL=self.VV, VV=self.LL, LV=self.VL, VL=self.LV)


def attention_blocks(scores: Tensor, text_length: int) -> Blocks:
    """Cut the map of one pair into its blocks (section 3.1): a softmax per block over its own columns, averaged over heads.

    Args:
        scores: (A, N, N), Q Kᵀ / √D before any softmax, words before regions.
        text_length: tokens of the text, [CLS] and [SEP] included.
    """
    words, regions = slice(1, text_length - 1), slice(text_length, None)

    def block(rows: slice, columns: slice) -> Tensor:
        per_head = scores[:, rows, columns].log_softmax(dim=-1)
        return per_head.logsumexp(dim=0) - math.log(len(scores))

    return Blocks(LL=block(words, words), VV=block(regions, regions), LV=block(words, regions), VL=block(regions, words))


def singular(blocks: Blocks, modality: Modality) -> Tensor:
    """Singular alignment (section 3.2): each word stands for the region it attends to most, or each region for its word.

    With i* = argmax_j A_LV[i, j] and P = row-softmax(A_VV[i*, j*]), the mean over words of KL(P_i ‖ A_LL,i) + KL(A_LL,i ‖ P_i);
    for modality ``"V"`` the mirror image. The argmax carries no gradient, P does. Returns a scalar.
    """
    own = blocks if modality == "L" else blocks.mirrored()
    nearest = own.LV.argmax(dim=1)  # (L,)
    log_pseudo = own.VV.exp()[nearest[:, None], nearest].log_softmax(dim=-1)  # (L, L)
    divergence = (log_pseudo.exp() - own.LL.exp()) * (log_pseudo - own.LL)
    return divergence.sum(dim=-1).mean()


def distributed(blocks: Blocks, modality: Modality) -> Tensor:
    """Distributed alignment (section 3.3): words attend to words by way of all regions, P = A_LV A_VL, or mirrored.

    The mean over rows of the symmetric KL between P and A_LL, where KL(q ‖ p) = Σ q (log q - log(p + 1e-6)) as in the
    published program. Returns a scalar.
    """
    own = blocks if modality == "L" else blocks.mirrored()
    pseudo, actual = own.LV.exp() @ own.VL.exp(), own.LL.exp()  # (L, L)
    log_pseudo = pseudo.clamp_min(torch.finfo(pseudo.dtype).tiny).log()
    divergence = pseudo * (log_pseudo - (actual + 1e-6).log()) + actual * (own.LL - (pseudo + 1e-6).log())
    return divergence.sum(dim=-1).mean()


Regulariser = Callable[[Blocks, Modality], Tensor]
REGULARISERS: dict[str, Regulariser] = {"singular": singular, "distributed": distributed}


def alignment_loss(regulariser: Regulariser, maps: list[Tensor], text_length: int, modality: Modality) -> Tensor:
    """The mean of ``regulariser`` over the maps (A, N, N) that several layers have of one pair with at least one word."""
    return torch.stack([regulariser(attention_blocks(scores, text_length), modality) for scores in maps]).mean()

"""IAIS: Inter-modal Alignment on Intra-modal Self-attentions (Ren et al. 2021, section 3), as pure functions of attention maps.

Shapes: A heads, N joined length, L words (without [CLS] and [SEP]), K regions. A_XY attends from rows X to columns Y.
A further regulariser is one function with ``@regulariser`` above it, written for words; regions give it the mirrored blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Modality = Literal["L", "V"]
MODALITIES: tuple[Modality, Modality] = ("L", "V")


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

    def seen_from(self, modality: Modality) -> Blocks:
        """The same, or mirrored, so that ``modality`` is what ``LL`` is of."""
        return self if modality == "L" else self.mirrored()


Regulariser = Callable[[Blocks, Modality], Tensor]
REGULARISERS: dict[str, Regulariser] = {}


def regulariser(of_words: Callable[[Blocks], Tensor]) -> Regulariser:
    """Register a loss, blocks → scalar, under the name of its function: the option IAIS has it, and evaluation measures it.

    What is registered, and returned, also takes the modality: for ``"V"`` the loss is that of the mirrored blocks.
    """

    @functools.wraps(of_words)
    def of_modality(blocks: Blocks, modality: Modality) -> Tensor:
        return of_words(blocks.seen_from(modality))

    REGULARISERS[of_words.__name__] = of_modality
    return of_modality


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


def nearest(own: Blocks) -> Tensor:
    """i* = argmax_j A_LV[i, j]: (L,), the region that each word attends to most."""
    return own.LV.argmax(dim=1)


def between_nearest(own: Blocks) -> Tensor:
    """A_VV[i*, j*]: (L, L), the attention between the regions that stand for the words. The argmax carries no gradient."""
    regions = nearest(own)
    return own.VV.exp()[regions[:, None], regions]


def singular_pseudo(own: Blocks) -> Tensor:
    """log P for P = row-softmax(A_VV[i*, j*]): (L, L)."""
    return between_nearest(own).log_softmax(dim=-1)


def distributed_pseudo(own: Blocks) -> Tensor:
    """P = A_LV A_VL: (L, L), each row sums to one."""
    return own.LV.exp() @ own.VL.exp()


def congruent_pseudo(own: Blocks) -> Tensor:
    """log P for P = row-softmax(Ā_LV A_VV Ā_LVᵀ): (L, L). Ā_LV is A_LV without gradient."""
    words_to_regions = own.LV.detach().exp()
    return (words_to_regions @ own.VV.exp() @ words_to_regions.T).log_softmax(dim=-1)


@regulariser
def singular(own: Blocks) -> Tensor:
    """Singular alignment (section 3.2): each word stands for the region it attends to most, or each region for its word.

    With P of ``singular_pseudo``, the mean over words of KL(P_i ‖ A_LL,i) + KL(A_LL,i ‖ P_i).
    """
    return symmetric_kl(singular_pseudo(own), own.LL).mean()


@regulariser
def distributed(own: Blocks) -> Tensor:
    """Distributed alignment (section 3.3): words attend to words by way of all regions, P = A_LV A_VL, or mirrored.

    The mean over rows of the symmetric KL between P and A_LL, where KL(q ‖ p) = Σ q (log q - log(p + 1e-6)) as in the
    published program.
    """
    pseudo, actual = distributed_pseudo(own), own.LL.exp()  # (L, L)
    log_pseudo = pseudo.clamp_min(torch.finfo(pseudo.dtype).tiny).log()
    divergence = pseudo * (log_pseudo - (actual + 1e-6).log()) + actual * (own.LL - (pseudo + 1e-6).log())
    return divergence.sum(dim=-1).mean()


@regulariser
def cacr(own: Blocks) -> Tensor:
    """Cross-modal Attention Congruence Regularisation (Pandey et al. 2023, arXiv 2212.10549), on the blocks that IAIS has.

    The mean over rows of the symmetric KL between row-softmax(A_LL) and row-softmax(Ā_LV A_VV Ā_LVᵀ), or mirrored: what the
    regions attend to, in the words' basis. A are the head-averaged blocks, Ā_LV is A_LV without gradient.
    """
    return symmetric_kl(congruent_pseudo(own), own.LL.exp().log_softmax(dim=-1)).mean()


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) of each row, from logarithms (…, C) to (…)."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def alignment_loss(regulariser: Regulariser, maps: list[Tensor], text_length: int, modality: Modality) -> Tensor:
    """The mean of ``regulariser`` over the maps (A, N, N) that several layers have of one pair with at least one word."""
    return torch.stack([regulariser(attention_blocks(scores, text_length), modality) for scores in maps]).mean()

"""IAIS: Inter-modal Alignment on Intra-modal Self-attentions (Ren et al. 2021, section 3), and other losses on attention.

A regulariser is a function of the attention of one matched (text, image) pair, ``PairAttention`` → scalar, under
``@regulariser``. It is written once, for words; for regions it receives the same pair with the modalities exchanged.

Shapes: A heads, L words (without [CLS] and [SEP]), K regions, N = L + 2 + K tokens of the joined sequence.
R rows: L, C columns: K if the modality is "L"; R = K, C = L if it is "V".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from utils.errors import InputError

Modality = Literal["L", "V"]
MODALITIES: tuple[Modality, Modality] = ("L", "V")


class Blocks(NamedTuple):
    """The four blocks of an attention map; rows attend to columns. Leading dimensions, such as heads, are free."""

    intra: Tensor  # (…, R, R) within the modality
    cross: Tensor  # (…, R, C) from the modality to the other one
    cross_back: Tensor  # (…, C, R) from the other modality back
    other: Tensor  # (…, C, C) within the other modality


@dataclass(frozen=True)
class PairAttention:
    """The attention of one (text, image) pair in one layer, as one modality sees it: the input of every regulariser.

    Attributes:
        scores: per-head blocks (A, rows, columns) of Q Kᵀ / √D before any softmax, fp32.
        modality: the modality of ``intra``: "L" for words, "V" for regions.
        layer: counted from 0.
    """

    scores: Blocks
    modality: Modality
    layer: int

    @classmethod
    def of_map(cls, scores: Tensor, text_length: int, layer: int = 0) -> PairAttention:
        """Cut a map (A, N, N), words before regions, as words see it; ``text_length`` counts [CLS] and [SEP]."""
        words, regions = slice(1, text_length - 1), slice(text_length, None)
        blocks = (scores[:, rows, columns] for rows in (words, regions) for columns in (words, regions))
        return cls(Blocks(*blocks), "L", layer)

    def seen_from(self, modality: Modality) -> PairAttention:
        """The same pair with ``modality`` as ``intra``."""
        return self if modality == self.modality else self._exchanged

    def per_head(self) -> Blocks:
        """Logarithms of the attention in each block, softmaxed over its own columns (section 3.1): (A, rows, columns)."""
        return Blocks(*(block.log_softmax(dim=-1) for block in self.scores))

    def head_mean(self) -> Blocks:
        """Logarithms of ``per_head`` averaged over heads: (rows, columns); each row of ``exp`` sums to one.

        Logarithms, because a divergence needs them and the logarithm of an average that underflowed is lost.
        """
        return self._head_mean

    # Evaluation applies every regulariser to each pair, from both sides.
    @cached_property
    def _head_mean(self) -> Blocks:
        return Blocks(*(block.logsumexp(dim=0) - math.log(len(block)) for block in self.per_head()))

    @cached_property
    def _exchanged(self) -> PairAttention:
        intra, cross, cross_back, other = self.scores
        return PairAttention(Blocks(other, cross_back, cross, intra), "V" if self.modality == "L" else "L", self.layer)


@dataclass(frozen=True)
class Regulariser:
    """A registered loss. ``alignment`` declares that it vanishes if both modalities attend alike."""

    name: str
    function: Callable[[PairAttention], Tensor]
    alignment: bool

    def __call__(self, pair: PairAttention, modality: Modality) -> Tensor:
        """The loss (), with ``modality`` as the one to align. Raises ``InputError`` if the function returns anything else."""
        pair = pair.seen_from(modality)
        loss: object = self.function(pair)
        trains = pair.scores.intra.requires_grad
        if isinstance(loss, Tensor) and loss.shape == () and loss.is_floating_point() and loss.requires_grad >= trains:
            return loss
        given = f"{loss.dtype}{[*loss.shape]}, requires_grad {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        expected = f"a floating-point tensor of shape [], requires_grad {trains}, computed from the attention"
        raise InputError(f"regulariser {self.name} in {self.function.__module__} returned {given}; expected {expected}")

    def check(self, heads: int) -> None:
        """Try the loss on a pair before work starts. Raises ``InputError`` as ``__call__`` does, and if the function fails."""
        attention = torch.zeros(heads, 29, 29, requires_grad=torch.is_grad_enabled())
        pair = PairAttention.of_map(attention, text_length=14)
        try:
            for modality in MODALITIES:
                loss = self(pair, modality)
                if loss.requires_grad and torch.autograd.grad(loss, attention, allow_unused=True)[0] is None:
                    message = "returned a loss that does not depend on the attention; it would train nothing"
                    raise InputError(f"regulariser {self.name} in {self.function.__module__} {message}")
        except InputError:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
            raise InputError(f"regulariser {self.name} in {self.function.__module__} failed: {wrong}") from error


REGULARISERS: dict[str, Regulariser] = {}


def regulariser(function: Callable[[PairAttention], Tensor], *, alignment: bool = False) -> Regulariser:
    """Register a loss under the name of its function: ``--IAIS`` accepts the name, evaluation measures it, tests check it."""
    registered = Regulariser(function.__name__, function, alignment)
    REGULARISERS[registered.name] = registered
    return registered


# For losses that vanish if both modalities attend alike; the tests hold them to that, and to a naive twin.
alignment_regulariser = partial(regulariser, alignment=True)


@alignment_regulariser
def singular(pair: PairAttention) -> Tensor:
    """Singular alignment (section 3.1): the nearest region stands for each word; or the nearest word for each region.

    The mean over words i of KL(P_i ‖ A_LL,i) + KL(A_LL,i ‖ P_i) with P of ``singular_target``.
    """
    blocks = pair.head_mean()
    return symmetric_kl(singular_target(blocks), blocks.intra).mean()


@alignment_regulariser
def distributed(pair: PairAttention) -> Tensor:
    """Distributed alignment (section 3.2): words attend to words by way of all regions, P = A_LV A_VL; or mirrored.

    The mean over rows of KL(P ‖ A_LL) + KL(A_LL ‖ P), where KL(q ‖ p) = Σ q (log q - log(p + 1e-6)) as in the published
    program.
    """
    blocks = pair.head_mean()
    target, intra = distributed_target(blocks), blocks.intra.exp()  # (R, R)
    log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
    divergence = target * (log_target - (intra + 1e-6).log()) + intra * (blocks.intra - (target + 1e-6).log())
    return divergence.sum(dim=-1).mean()


@alignment_regulariser
def cacr(pair: PairAttention) -> Tensor:
    """Cross-modal Attention Congruence Regularisation (Pandey et al. 2023, arXiv 2212.10549), on head-averaged blocks.

    The mean over rows of the symmetric KL between row-softmax(A_LL) and row-softmax(Ā_LV A_VV Ā_LVᵀ), or mirrored: what the
    regions attend to, in the words' basis. Ā_LV is A_LV without gradient.
    """
    blocks = pair.head_mean()
    return symmetric_kl(congruent_target(blocks), blocks.intra.exp().log_softmax(dim=-1)).mean()


def nearest(blocks: Blocks) -> Tensor:
    """i* = argmax_j A_LV[i, j] (R,): the region that each word attends to most. Carries no gradient."""
    return blocks.cross.argmax(dim=1)


def between_nearest(blocks: Blocks) -> Tensor:
    """A_VV[i*, j*] (R, R): the attention between the regions that stand for the words."""
    regions = nearest(blocks)
    return blocks.other.exp()[regions[:, None], regions]


def singular_target(blocks: Blocks) -> Tensor:
    """log P (R, R) for P = row-softmax(A_VV[i*, j*])."""
    return between_nearest(blocks).log_softmax(dim=-1)


def distributed_target(blocks: Blocks) -> Tensor:
    """P = A_LV A_VL (R, R); each row sums to one."""
    return blocks.cross.exp() @ blocks.cross_back.exp()


def congruent_target(blocks: Blocks) -> Tensor:
    """log P (R, R) for P = row-softmax(Ā_LV A_VV Ā_LVᵀ)."""
    cross = blocks.cross.detach().exp()
    return (cross @ blocks.other.exp() @ cross.T).log_softmax(dim=-1)


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) of each row, from logarithms (…, C) to (…)."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def mean_over_layers(regulariser: Regulariser, layers: Sequence[PairAttention], modality: Modality) -> Tensor:
    """The mean () of a regulariser over the layers of one pair."""
    return torch.stack([regulariser(pair, modality) for pair in layers]).mean()

"""ISDa: how far the attention among the words of annotated objects is from that among their regions (Ren et al. 2021).

And ISD, without annotation: how far attention is from what the alignment losses compare it with. Equations: docs/evaluation.md.
Shapes: N objects of a pair, L word pieces, K regions, A heads; P pairs, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.image_db import Image
from data.sources.entities import Annotated, Caption
from data.text_db import Text
from data.tokenizer import WordPieceTokenizer
from evaluation.bootstrap import Bootstrap
from evaluation.retriever import Retriever
from model.iais import MODALITIES, REGULARISERS, Blocks, PairAttention, symmetric_kl

SURE, NEAR = 0.5, 0.3  # IoU of the regions of an object, and of its best one where no other is
NOT_VISUAL = "notvisual"  # the type of phrases that speak of nothing to be seen
IMAGES_SKIPPED = ("not_in_img_db", "not_in_txt_db", "no_annotation")
CHAINS_SKIPPED = ("not_visual", "scene", "no_box", "no_region", "no_word_pieces")
CAPTIONS_SKIPPED = ("too_long", "fewer_than_2_objects")


class Objects(NamedTuple):
    """Which word pieces (N, L) and which regions (N, K) are of each object, bool; every object has some of both."""

    pieces: np.ndarray
    regions: np.ndarray

    @property
    def disjoint(self) -> bool:
        """Whether no region is of two objects."""
        return bool((self.regions.sum(axis=0) <= 1).all())


def isda(blocks: Blocks, objects: Objects) -> Tensor:
    """The mean over objects of KL(a ‖ b) + KL(b ‖ a), a being the attention among their words and b among their regions."""
    words = among_objects(blocks.intra, torch.from_numpy(objects.pieces))
    regions = among_objects(blocks.other, torch.from_numpy(objects.regions))
    return symmetric_kl(words, regions).mean()


def among_objects(attention: Tensor, members: Tensor) -> Tensor:
    """From attention among C words or regions to that among N objects, as logarithms of rows that sum to one.

    Logarithms throughout, so that a row keeps its proportions however little of its attention is on objects. The mean over an
    object's rows is a sum here: their number goes in the normalisation.

    Args:
        attention: (C, C), logarithms.
        members: (N, C) bool, no row empty; one of the C may be of several objects, and counts in full for each.
    """
    outside = torch.zeros(members.shape, dtype=torch.float64).masked_fill(~members, -torch.inf)
    onto = (attention.double()[:, None] + outside).logsumexp(dim=2)  # (C, N)
    return (outside[:, :, None] + onto).logsumexp(dim=1).log_softmax(dim=1)  # (N, N)


def regions_of(boxes: np.ndarray, image: Image) -> np.ndarray:
    """The regions (K,) bool of an object with ``boxes`` (boxes, 4): those of IoU ≥ ``SURE`` with one of them.

    Where there is none, it is the one of the largest IoU, the first of equal ones, if that is ≥ ``NEAR``.
    """
    best = overlaps(image.boxes[:, :4].astype(np.float64), boxes).max(axis=1)
    sure: np.ndarray = best >= SURE
    return sure if sure.any() else (best >= NEAR) & (np.arange(len(best)) == best.argmax())


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4), x1 y1 x2 y2: (n, m), 0 for two without area."""
    corners = np.maximum(ours[:, None, :2], theirs[:, :2]), np.minimum(ours[:, None, 2:], theirs[:, 2:])
    shared = (corners[1] - corners[0]).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class Case(NamedTuple):
    """A pair, and what is measured of its attention: numbers by name, NaN where the pair is not one to measure it of."""

    text: Text
    image: Image
    measure: Callable[[PairAttention], dict[str, float]]


class Tally:
    """What was measured, and what was left out, counted by the reason.

    Attributes:
        objects: N, summed over pairs.
        shared: pairs in which a region is of two objects.
        images, captions, chains: how many were left out for each reason.
    """

    def __init__(self) -> None:
        self.objects = self.shared = 0
        self.images = dict.fromkeys(IMAGES_SKIPPED, 0)
        self.captions = dict.fromkeys(CAPTIONS_SKIPPED, 0)
        self.chains = dict.fromkeys(CHAINS_SKIPPED, 0)

    def skipped(self) -> dict[str, dict[str, int]]:
        """The counts by reason, in JSON's types."""
        return {"images": self.images, "captions": self.captions, "chains": self.chains}


def annotated_cases(name: str, annotated: Annotated, image: Image, retriever: Retriever, tally: Tally) -> Iterator[Case]:
    """The captions of the picture ``name`` in which ISDa can be measured: those of at least two objects."""
    for number, caption in enumerate(annotated.captions):
        ids = retriever.tokenizer.encode(" ".join(caption.words))
        text = Text(f"{name}#{number}", np.array(ids, np.int64), image.name, {})
        if len(ids) + 2 > retriever.config.max_position_embeddings:
            tally.captions["too_long"] += 1
            continue
        objects = find_objects(caption, annotated, image, retriever.tokenizer, tally)
        if len(objects.pieces) < 2:
            tally.captions["fewer_than_2_objects"] += 1
            continue
        tally.objects += len(objects.pieces)
        tally.shared += not objects.disjoint
        yield Case(text, image, partial(measure_isda, objects=objects))


def find_objects(caption: Caption, annotated: Annotated, image: Image, tokenizer: WordPieceTokenizer, tally: Tally) -> Objects:
    """The chains of a caption that have word pieces and regions, in the order of their first phrases."""
    piece_of = np.repeat(np.arange(len(caption.words)), [len(tokenizer.encode(word)) for word in caption.words])  # (L,)
    pieces: dict[int, np.ndarray] = {}
    for phrase in caption.phrases:
        of_phrase = (piece_of >= phrase.words.start) & (piece_of < phrase.words.stop)
        pieces[phrase.chain] = pieces.get(phrase.chain, False) | of_phrase
    not_visual = {phrase.chain for phrase in caption.phrases if NOT_VISUAL in phrase.types}
    found = []
    for chain, of_chain in pieces.items():
        if chain in annotated.boxes:
            regions = regions_of(annotated.boxes[chain], image)
            reason = "no_region" if not regions.any() else "" if of_chain.any() else "no_word_pieces"
        else:
            reason = "not_visual" if chain in not_visual else "scene" if chain in annotated.scenes else "no_box"
        if reason:
            tally.chains[reason] += 1
        else:
            found.append((of_chain, regions))
    return Objects(*(np.array([row[side] for row in found]) for side in (0, 1)))


def measure_isda(pair: PairAttention, objects: Objects) -> dict[str, float]:
    """ISDa of a pair, and under a second name if no region is of two of its objects."""
    value = float(isda(pair.head_mean(), objects))
    return {"isda": value, "isda_disjoint": value if objects.disjoint else np.nan}


def measure_isd(pair: PairAttention) -> dict[str, float]:
    """Every alignment loss of a pair, for words and for regions."""
    return {f"{name}_{way}": float(loss(pair, way)) for name, loss in REGULARISERS.items() for way in MODALITIES}


def evened(pair: PairAttention) -> PairAttention:
    """Even attention to every word and to every region, in blocks of the same shapes."""
    return replace(pair, scores=Blocks(*(torch.zeros_like(block[:1]) for block in pair.scores)))


class Measured(NamedTuple):
    """Measures of pairs.

    Attributes:
        names: M.
        values: (P, layers, 1 or 1 + A, M) float64: of head-averaged attention, then of each head if asked for.
        even: (P, M), what they would be if attention were even.
        image_of: (P,), which pairs have an image in common; images are counted from 0.
    """

    names: list[str]
    values: np.ndarray
    even: np.ndarray
    image_of: np.ndarray


def measure(retriever: Retriever, cases: Iterable[Case], layers: Sequence[int], heads: bool) -> Measured:
    """Measure ``cases``, of which there is at least one, in these layers, counted from 0.

    Raises:
        InputError: as ``Retriever.attention``.
    """
    shown = [None, *range(retriever.config.num_attention_heads)] if heads else [None]
    names: list[str] = []
    values, even, image_of = [], [], []
    place: dict[str, int] = {}
    with retriever.compute.inference(retriever.model):
        for case in cases:
            attention = retriever.attention(case.text, case.image, layers)
            found = [[case.measure(attention.pair(layer, head)) for head in shown] for layer in layers]
            of_even = case.measure(evened(attention.pair(layers[0])))
            names = list(of_even)
            even.append(list(of_even.values()))
            values.append([[list(of_head.values()) for of_head in of_layer] for of_layer in found])
            image_of.append(place.setdefault(case.image.name, len(place)))
    return Measured(names, np.array(values), np.array(even), np.array(image_of))


def summary(measured: Measured, layers: Sequence[int]) -> dict[str, Any]:
    """Means over pairs and their 95 % intervals, of each layer, of its heads, and of even attention, in JSON's types.

    Intervals resample images, each with all its captions.
    """
    bootstrap = Bootstrap(int(measured.image_of.max()) + 1)

    def estimates(values: np.ndarray) -> dict[str, Any]:
        means: dict[str, float | None] = {}
        intervals: dict[str, list[float] | None] = {}
        for name, column in zip(measured.names, values.T, strict=True):
            known = ~np.isnan(column)
            means[name] = float(column[known].mean()) if known.any() else None
            intervals[name] = bootstrap.mean(column[known], measured.image_of[known])
        return {**means, "interval_95": intervals}

    of_layers = []
    for layer, values in zip(layers, measured.values.swapaxes(0, 1), strict=True):
        heads = [{"head": head, **estimates(values[:, 1 + head])} for head in range(values.shape[1] - 1)]
        of_layers.append({"layer": layer, **estimates(values[:, 0]), **({"heads": heads} if heads else {})})
    return {"layers": of_layers, "even_attention": estimates(measured.even)}


def table(results: Mapping[str, Any]) -> str:
    """Means and intervals of head-averaged attention, one line a layer, and of even attention."""
    even = results["even_attention"]
    names = list(even["interval_95"])
    lines = ["layer" + "".join(f"{name:>28}" for name in names)]
    for title, entry in [*((entry["layer"], entry) for entry in results["layers"]), ("even", even)]:
        cells = []
        for name in names:
            mean, bounds = entry[name], entry["interval_95"][name]
            span = f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
            cells.append(("–" if mean is None else f"{mean:.4f}") + span)
        lines.append(f"{title:>5}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)

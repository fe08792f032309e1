"""ISDa: the distance between attention among the words of annotated objects and among their regions (Ren et al. 2021).

And ISD, without annotation: the alignment losses of every text with its image. docs/evaluation.md has the equations.
Shapes: N objects of a pair, L word pieces, K regions, A heads; P pairs, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.image_db import Image, ImageDatabase
from data.picture_names import feature_name, picture_stem, trailing_number
from data.sources.entities import Annotated, Caption, picture_names, read_annotated
from data.split import RetrievalSplit
from data.text_db import Text
from data.tokenizer import WordPieceTokenizer
from evaluation.analysis import Bootstrap
from evaluation.retriever import Retriever
from evaluation.tables import aligned, fixed
from model.iais import MODALITIES, REGULARISERS, Blocks, PairAttention, symmetric_kl
from utils.errors import InputError
from utils.files import short_repr
from utils.logging import progress_bar

SURE, NEAR = 0.5, 0.3  # minimum IoU of an object's regions, and of its best one if none reaches SURE


class Objects(NamedTuple):
    """The word pieces (N, L) and regions (N, K) of each object, bool; no object lacks either."""

    pieces: np.ndarray
    regions: np.ndarray

    @property
    def disjoint(self) -> bool:
        """Whether no region belongs to two objects."""
        return bool((self.regions.sum(axis=0) <= 1).all())


def isda(blocks: Blocks, objects: Objects) -> Tensor:
    """Return the mean over objects of KL(a ‖ b) + KL(b ‖ a): a is the attention among their words, b among their regions."""
    words = among_objects(blocks.intra, torch.from_numpy(objects.pieces))
    regions = among_objects(blocks.other, torch.from_numpy(objects.regions))
    return symmetric_kl(words, regions).mean()


def among_objects(attention: Tensor, members: Tensor) -> Tensor:
    """Reduce log-attention (C, C) among words or regions to that among objects, (N, N); each row of ``exp`` sums to one.

    ``members`` (N, C) bool has no empty row; a region of several objects counts in full for each. Works on logarithms
    throughout, so that rows keep their proportions however little attention is on objects. Rows of an object are summed rather
    than averaged, as the normalisation cancels their number.
    """
    outside = torch.zeros(members.shape, dtype=torch.float64).masked_fill(~members, -torch.inf)
    onto = (attention.double()[:, None] + outside).logsumexp(dim=2)  # (C, N)
    return (outside[:, :, None] + onto).logsumexp(dim=1).log_softmax(dim=1)  # (N, N)


def regions_of(boxes: np.ndarray, image: Image) -> np.ndarray:
    """Return the regions (K,) bool of an object with ``boxes`` (boxes, 4): those of IoU ≥ ``SURE`` with one of them.

    If there is none, the first region of the highest IoU, provided it is ≥ ``NEAR``.
    """
    best = iou(image.boxes[:, :4].astype(np.float64), boxes).max(axis=1)
    sure: np.ndarray = best >= SURE
    return sure if sure.any() else (best >= NEAR) & (np.arange(len(best)) == best.argmax())


def iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the intersection over union (n, m) of boxes (n, 4) and (m, 4), x1 y1 x2 y2; 0 for two boxes without area."""
    corners = np.maximum(ours[:, None, :2], theirs[:, :2]), np.minimum(ours[:, None, 2:], theirs[:, 2:])
    shared = (corners[1] - corners[0]).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class Case(NamedTuple):
    """A pair, and the function that returns measures of its attention by name, NaN if not defined for this pair."""

    text: Text
    image: Image
    measure: Callable[[PairAttention], dict[str, float]]


def annotated_pairs(
    folder: Path, image_db: ImageDatabase, wanted: Collection[str] | None, retriever: Retriever, counts: dict[str, Any]
) -> Iterator[Case]:
    """Yield the captions of an Entities folder with at least two objects, and their images.

    ``wanted`` are names of images, None for all. ``counts`` receives the number of objects, of pairs whose objects share
    regions, and of what was skipped, as in ``isda.json``. Raises ``InputError`` if a file is damaged, two pictures are the same
    image, or no caption has two objects.
    """
    images = dict.fromkeys(("not_in_img_db", "not_in_txt_db", "no_annotation"), 0)
    captions = dict.fromkeys(("too_long", "fewer_than_2_objects"), 0)
    chains = dict.fromkeys(("not_visual", "scene", "no_box", "no_region", "no_word_pieces"), 0)
    skipped = {"images": images, "captions": captions, "chains": chains}
    counts |= {"objects": 0, "pairs_with_shared_regions": 0, "skipped": skipped}
    tokenizer, longest = retriever.tokenizer, retriever.config.max_position_embeddings - 2
    picture_of = match_pictures(folder, image_db, wanted, images)
    for name, picture in progress_bar(True, iterable=picture_of.items(), desc="isda", unit="image"):
        annotated, image = read_annotated(folder, picture), image_db[name]
        for number, caption in enumerate(annotated.captions):
            ids = tokenizer.encode(" ".join(caption.words))
            if len(ids) > longest:
                captions["too_long"] += 1
                continue
            objects = find_objects(caption, annotated, image, tokenizer, chains)
            if len(objects.pieces) < 2:
                captions["fewer_than_2_objects"] += 1
                continue
            counts["objects"] += len(objects.pieces)
            counts["pairs_with_shared_regions"] += not objects.disjoint
            text = Text(f"{picture}#{number}", np.array(ids, np.int64), name, {})
            yield Case(text, image, partial(measure_isda, objects=objects))
    if not counts["objects"]:
        raise InputError(f"{folder}: no caption with 2 objects to measure, expected some; skipped: {skipped}")


def match_pictures(
    folder: Path, image_db: ImageDatabase, wanted: Collection[str] | None, skipped: dict[str, int]
) -> dict[str, str]:
    """Return the picture in ``folder`` of each image to measure; count the others in ``skipped``."""
    records = {picture: record_names(picture) for picture in picture_names(folder)}
    absent = set(image_db.absent({name for names in records.values() for name in names}))
    picture_of: dict[str, str] = {}
    for picture, names in records.items():
        asked = [name for name in names if wanted is None or name in wanted]
        image = next((name for name in asked if name not in absent), None)
        if image is None:
            skipped["not_in_img_db" if asked else "not_in_txt_db"] += 1
        elif (other := picture_of.setdefault(image, picture)) != picture:
            both = f"{short_repr(other)} and {short_repr(picture)}"
            raise InputError(f"{folder}: {both} are both image {short_repr(image)}, expected one picture per image")
    skipped["no_annotation"] = len(set(wanted or ()).difference(*records.values()))
    return picture_of


def record_names(picture: str) -> list[str]:
    """Return the names that an image database may have for a picture: its own, and for a bare number that of Flickr30k."""
    stem = picture_stem(picture)
    is_number = stem.isascii() and stem.isdecimal() and trailing_number(stem) is not None
    return [feature_name(dataset, picture) for dataset in (("", "flickr30k") if is_number else ("",))]


def find_objects(
    caption: Caption, annotated: Annotated, image: Image, tokenizer: WordPieceTokenizer, skipped: dict[str, int]
) -> Objects:
    """Return the chains of a caption that have word pieces and regions, by first phrase; count the others in ``skipped``."""
    word_of = np.repeat(np.arange(len(caption.words)), [len(tokenizer.encode(word)) for word in caption.words])  # (L,)
    pieces: dict[int, np.ndarray] = {}
    for phrase in caption.phrases:
        of_phrase = (word_of >= phrase.words.start) & (word_of < phrase.words.stop)
        pieces[phrase.chain] = pieces.get(phrase.chain, False) | of_phrase
    not_visual = {phrase.chain for phrase in caption.phrases if "notvisual" in phrase.types}
    objects = []
    for chain, of_chain in pieces.items():
        if chain in annotated.boxes:
            regions = regions_of(annotated.boxes[chain], image)
            reason = "no_region" if not regions.any() else "" if of_chain.any() else "no_word_pieces"
        else:
            reason = "not_visual" if chain in not_visual else "scene" if chain in annotated.scenes else "no_box"
        if reason:
            skipped[reason] += 1
        else:
            objects.append((of_chain, regions))
    return Objects(*(np.array([row[side] for row in objects]) for side in (0, 1)))


def matched_pairs(split: RetrievalSplit) -> Iterator[Case]:
    """Yield each text of a split with its image, image by image, to be measured by every alignment loss."""
    ends = np.bincount(split.image_of).cumsum()
    texts_of = np.split(split.image_of.argsort(kind="stable"), ends[:-1])
    images = zip(split.image_names, texts_of, strict=True)
    for name, texts in progress_bar(True, iterable=images, total=len(texts_of), desc="isd", unit="image"):
        image = split.image_db[name]
        for text in texts:
            yield Case(split.text_db[split.text_db.ids[text]], image, measure_isd)


def measure_isda(pair: PairAttention, objects: Objects) -> dict[str, float]:
    """Return ISDa of a pair; ``isda_disjoint`` is the same, but NaN if objects share regions."""
    value = float(isda(pair.head_mean(), objects))
    return {"isda": value, "isda_disjoint": value if objects.disjoint else np.nan}


def measure_isd(pair: PairAttention) -> dict[str, float]:
    """Return every alignment loss of a pair, for words (L) and for regions (V)."""
    return {f"{name}_{side}": float(loss(pair, side)) for name, loss in REGULARISERS.items() for side in MODALITIES}


def with_uniform_attention(pair: PairAttention) -> PairAttention:
    """Return a pair of the same shape, with one head and uniform attention in each block."""
    return replace(pair, scores=Blocks(*(torch.zeros_like(block[:1]) for block in pair.scores)))


def measure(retriever: Retriever, cases: Iterable[Case], layers: Sequence[int], heads: bool) -> dict[str, Any]:
    """Measure at least one case in these layers, counted from 0; return ``summary`` and ``counts`` of pairs and images."""
    columns = [None, *range(retriever.config.num_attention_heads)] if heads else [None]
    names: list[str] = []
    values, even, image_of = [], [], []
    index_of: dict[str, int] = {}
    with retriever.compute.inference(retriever.model):
        for case in cases:
            attention = retriever.attention(case.text, case.image, layers)
            values.append([[[*case.measure(attention.pair(layer, head)).values()] for head in columns] for layer in layers])
            of_even = case.measure(with_uniform_attention(attention.pair(layers[0])))
            names = list(of_even)
            even.append(list(of_even.values()))
            image_of.append(index_of.setdefault(case.image.name, len(index_of)))
    results = summary(names, np.array(values), np.array(even), np.array(image_of), layers)
    return results | {"counts": {"pairs": len(values), "images": len(index_of)}}


def summary(
    names: Sequence[str], values: np.ndarray, even: np.ndarray, image_of: np.ndarray, layers: Sequence[int]
) -> dict[str, Any]:
    """Return means and 95 % intervals by layer and head, and of uniform attention, JSON-serialisable.

    Intervals resample images, each with all its captions.

    Args:
        names: of M measures.
        values: (P, layers, 1 or 1 + A, M) float64, of head-averaged attention, then of each head if requested.
        even: (P, M), of uniform attention.
        image_of: (P,), index of the image of each pair.
    """
    bootstrap = Bootstrap(int(image_of.max()) + 1)

    def estimates(values: np.ndarray) -> dict[str, Any]:
        return bootstrap.estimates(dict(zip(names, values.T, strict=True)), image_of)

    of_layers = []
    for layer, of_heads in zip(layers, values.swapaxes(0, 1), strict=True):
        heads = [{"head": head, **estimates(of_heads[:, 1 + head])} for head in range(of_heads.shape[1] - 1)]
        of_layers.append({"layer": layer, **estimates(of_heads[:, 0]), **({"heads": heads} if heads else {})})
    return {"layers": of_layers, "even_attention": estimates(even)}


def table(results: Mapping[str, Any]) -> str:
    """Format the means and intervals of head-averaged attention, one line per layer, and of uniform attention."""
    even = results["even_attention"]
    names = list(even["interval_95"])
    rows = [["layer", *names]]
    for title, entry in [*((entry["layer"], entry) for entry in results["layers"]), ("even", even)]:
        cells = []
        for name in names:
            mean, bounds = entry[name], entry["interval_95"][name]
            span = f" [{fixed(bounds[0], 4)}, {fixed(bounds[1], 4)}]" if bounds else ""
            cells.append(("–" if mean is None else fixed(mean, 4)) + span)
        rows.append([str(title), *cells])
    return aligned(rows)

"""Writes scenes the way real sources come: pictures, detector features, Karpathy's JSON, Flickr30k Entities, Winoground."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from examples.scenes.captions import CAPTIONS, Caption, swap_roles, write_captions
from examples.scenes.draw import draw_picture
from examples.scenes.features import normalised, propose_boxes, region_features
from examples.scenes.layout import HEIGHT, WIDTH, Scene, draw_scene, draw_twins

SPLITS = ("train", "val", "test")
CHAINS_PER_IMAGE = 20  # numbers reserved for an image's coreference chains: its items, then groups, then the scene


@dataclass(frozen=True)
class Recipe:
    """What a dataset of scenes depends on, beside the sizes of its splits.

    Attributes:
        twins: share of the images that belong to twin pairs.
        items: at least and at most so many in a scene.
        relations: captions of each image that say how two of its items lie; in twins, those that are false of the other.
    """

    seed: int
    twins: float = 0.1
    items: tuple[int, int] = (3, 6)
    relations: int = 2


@dataclass(frozen=True)
class Job:
    """One image to make. ``pair`` is (number of the pair, 0 or 1) for twins."""

    imgid: int
    split: str
    index: int
    pair: tuple[int, int] | None

    @property
    def stem(self) -> str:
        return f"scenes_{self.imgid:012d}"


def plan(counts: dict[str, int], recipe: Recipe) -> list[Job]:
    """All images in order; a share of each split, spread at random, belongs to twin pairs.

    What is in image i of a split depends on the seed, the share and the split's own size, not on the other splits.
    """
    jobs: list[Job] = []
    for split in SPLITS:
        count = counts[split]
        pairs = round(count * recipe.twins / 2)
        order = _rng(recipe.seed, split, count, "twins").permutation(count)[: 2 * pairs].tolist()
        role = {index: divmod(position, 2) for position, index in enumerate(order)}
        jobs += [Job(len(jobs) + index, split, index, role.get(index)) for index in range(count)]
    return jobs


def scene_of(job: Job, recipe: Recipe) -> Scene:
    """The job's scene; twins come from the same draw."""
    if job.pair is None:
        return draw_scene(_rng(recipe.seed, job.split, job.index, "layout"), recipe.items)
    number, role = job.pair
    return draw_twins(_rng(recipe.seed, job.split, number, "twin layout"), recipe.items)[role]


def captions_of(job: Job, scene: Scene, recipe: Recipe) -> list[Caption]:
    """Five captions; the second twin's relations are the first twin's with the roles exchanged."""
    relations = recipe.relations
    captions = write_captions(scene, relations, _rng(recipe.seed, job.split, job.index, "captions"))
    if job.pair is None:
        return captions
    number, role = job.pair
    first = scene_of(Job(job.imgid, job.split, job.index, (number, 0)), recipe)
    swapped = write_captions(first, relations, _rng(recipe.seed, job.split, number, "twin captions"))[:relations]
    return [*(swapped if role == 0 else map(swap_roles, swapped)), *captions[relations:]]


def twins_of(jobs: list[Job]) -> list[tuple[Job, Job]]:
    """The twin pairs among these images of one split."""
    pairs: dict[int, dict[int, Job]] = {}
    for job in jobs:
        if job.pair is not None:
            pairs.setdefault(job.pair[0], {})[job.pair[1]] = job
    return [(pair[0], pair[1]) for _, pair in sorted(pairs.items())]


def write_image(root: Path, job: Job, recipe: Recipe) -> dict[str, Any]:
    """Writes the image's picture, features and Entities files; returns its entry of Karpathy's JSON."""
    scene = scene_of(job, recipe)
    captions = captions_of(job, scene, recipe)
    filename = f"{job.stem}.jpg"
    picture_path = root / "images" / filename
    # twins share their background, so that nothing but the two places tells them apart
    purpose, number = ("look", job.index) if job.pair is None else ("twin look", job.pair[0])
    draw_picture(scene, _rng(recipe.seed, job.split, number, purpose)).save(picture_path, quality=92, subsampling=0)

    boxes, conf = propose_boxes(scene, _rng(recipe.seed, job.split, job.index, "boxes"))
    with Image.open(picture_path) as picture:  # what was saved, JPEG blur included, is what any other reader would see
        features = region_features(picture.convert("RGB"), boxes)
    np.savez(
        root / "features" / f"{job.stem}.npz",
        features=features,
        norm_bb=normalised(boxes),
        conf=conf.astype(np.float16),
    )
    _write_entities(root / "entities", job, filename, scene, captions)

    sentids = [job.imgid * CAPTIONS + number for number in range(len(captions))]
    sentences = [
        {"tokens": caption.tokens, "raw": caption.raw, "imgid": job.imgid, "sentid": sentid}
        for sentid, caption in zip(sentids, captions, strict=True)
    ]
    return {"filename": filename, "imgid": job.imgid, "split": job.split, "sentids": sentids, "sentences": sentences}


def write_winoground(path: Path, jobs: list[Job], recipe: Recipe) -> int:
    """One line for each of two swapped captions, one a direction, of every twin pair among ``jobs``; returns how many."""
    examples: list[dict[str, Any]] = []
    for pair in twins_of(jobs):
        captions = [captions_of(job, scene_of(job, recipe), recipe)[:2] for job in pair]
        for caption_0, caption_1 in zip(*captions, strict=True):
            examples.append(
                {
                    "id": len(examples),
                    "image_0": pair[0].stem,
                    "image_1": pair[1].stem,
                    "caption_0": caption_0.raw,
                    "caption_1": caption_1.raw,
                    "tag": "Noun Phrase",
                    "secondary_tag": "",
                    "num_main_preds": 1,
                    "collapsed_tag": "Object",
                }
            )
    path.parent.mkdir()
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return len(examples)


def _write_entities(root: Path, job: Job, filename: str, scene: Scene, captions: list[Caption]) -> None:
    """``Sentences/<stem>.txt`` and ``Annotations/<stem>.xml``: chains of items have a box, the scene's has none."""
    first = job.imgid * CHAINS_PER_IMAGE + 1
    chains: dict[tuple[int, ...], int] = {(index,): first + index for index in range(len(scene.items))}
    lines = []
    for caption in captions:
        words = []
        for segment in caption.segments:
            if isinstance(segment, str):
                words.append(segment)
            else:
                chain = chains.setdefault(segment.items, first + len(chains))
                words.append(f"[/EN#{chain}/{'other' if segment.items else 'scene'} {segment.text}]")
        lines.append(" ".join(words) + "\n")
    (root / "Sentences" / f"{job.stem}.txt").write_text("".join(lines), encoding="utf-8")

    annotation = ElementTree.Element("annotation")
    _leaf(annotation, "filename", filename)
    size = ElementTree.SubElement(annotation, "size")
    for tag, value in (("width", WIDTH), ("height", HEIGHT), ("depth", 3)):
        _leaf(size, tag, value)
    for index, item in enumerate(scene.items):
        entry = ElementTree.SubElement(annotation, "object")
        for members, chain in chains.items():
            if index in members:
                _leaf(entry, "name", chain)
        box = ElementTree.SubElement(entry, "bndbox")
        for tag, edge in zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True):
            _leaf(box, tag, round(edge))
    if () in chains:
        entry = ElementTree.SubElement(annotation, "object")
        _leaf(entry, "name", chains[()])
        _leaf(entry, "scene", 1)
        _leaf(entry, "nobndbox", 1)
    ElementTree.indent(annotation)
    ElementTree.ElementTree(annotation).write(root / "Annotations" / f"{job.stem}.xml", encoding="utf-8")


def _leaf(parent: ElementTree.Element, tag: str, value: object) -> None:
    ElementTree.SubElement(parent, tag).text = str(value)


def _rng(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """An own stream for every (image, purpose), so that no worker's order of work matters."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *purpose.encode()])

"""The scenes dataset, a function of a recipe, in the formats of real sources: pictures, detector features, Karpathy's JSON,
Flickr30k Entities, Winoground.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.scenes.captions import CAPTIONS, Caption, swap_roles, write_captions
from examples.scenes.features import normalised, propose_boxes, region_features
from examples.scenes.scene import HEIGHT, WIDTH, Scene, draw_picture, draw_scene, draw_twins
from utils.files import atomic_folder
from utils.parallel import in_order

SPLITS = ("train", "val", "test")
CHAINS_PER_IMAGE = 20  # numbers reserved for the coreference chains of an image: its items, then groups, then the scene

README = """\
The scenes dataset: drawn pictures of simple shapes, made by
scripts/make_scenes.py --seed {seed} --twins {twins} --items {items} --relations {relations}.

THESE ARE DRAWN SCENES, NOT PHOTOGRAPHS. Results on them say nothing about Flickr30k, COCO or any other real collection.
They exist so that every program of this repository can be run from end to end on a bare machine.

images/                 {images} pictures ({train} train, {val} val, {test} test)
dataset_scenes.json     five captions per image, in the layout of Karpathy's files
features/               region features of each picture, computed from its pixels by fixed rules (no network, nothing learned)
entities/               phrases and their boxes, in the layout of Flickr30k Entities
twins.json              the twin of each image that has one, for the training option --neighbours
winoground/             {examples} examples from the twins of the test split, in the layout of Winoground

A share of {twins} of the images of each split belongs to twin pairs: same items, same background, two items exchanged.
The first {relations} captions of each twin consist of the same words as its twin's and are false of it.
"""


@dataclass(frozen=True)
class Recipe:
    """What a dataset of scenes depends on, besides the sizes of its splits.

    Attributes:
        twins: share of the images that belong to twin pairs.
        items: minimum and maximum number of items per scene.
        relations: captions per image that relate two items; in twins, the ones that are false of the other twin.
    """

    seed: int
    twins: float = 0.1
    items: tuple[int, int] = (3, 6)
    relations: int = 2


@dataclass(frozen=True)
class Job:
    """One image to draw. ``pair`` is (number of the pair, 0 or 1) for twins."""

    imgid: int
    split: str
    index: int
    pair: tuple[int, int] | None

    @property
    def stem(self) -> str:
        """The file name of the image without suffix."""
        return f"scenes_{self.imgid:012d}"


def plan(counts: dict[str, int], recipe: Recipe) -> list[Job]:
    """All images in order; a random share of each split belongs to twin pairs.

    Image i of a split depends on the seed, the share and the size of its split, not on the other splits.
    """
    jobs: list[Job] = []
    for split in SPLITS:
        count = counts[split]
        pairs = round(count * recipe.twins / 2)
        order = random_stream(recipe.seed, split, count, "twins").permutation(count)[: 2 * pairs].tolist()
        role = {index: divmod(position, 2) for position, index in enumerate(order)}
        jobs += [Job(len(jobs) + index, split, index, role.get(index)) for index in range(count)]
    return jobs


def scene_of(job: Job, recipe: Recipe) -> Scene:
    """The scene of an image; twins come from the same draw."""
    if job.pair is None:
        return draw_scene(random_stream(recipe.seed, job.split, job.index, "layout"), recipe.items)
    number, role = job.pair
    return draw_twins(random_stream(recipe.seed, job.split, number, "twin layout"), recipe.items)[role]


def captions_of(job: Job, scene: Scene, recipe: Recipe) -> list[Caption]:
    """Five captions; the second twin's relations are the first twin's with the roles exchanged."""
    relations = recipe.relations
    captions = write_captions(scene, relations, random_stream(recipe.seed, job.split, job.index, "captions"))
    if job.pair is None:
        return captions
    number, role = job.pair
    first = scene_of(Job(job.imgid, job.split, job.index, (number, 0)), recipe)
    swapped = write_captions(first, relations, random_stream(recipe.seed, job.split, number, "twin captions"))[:relations]
    return [*(swapped if role == 0 else map(swap_roles, swapped)), *captions[relations:]]


def twins_of(jobs: list[Job]) -> list[tuple[Job, Job]]:
    """The twin pairs among these images of one split."""
    twins = sorted((job for job in jobs if job.pair is not None), key=lambda job: job.pair or ())
    return list(zip(twins[::2], twins[1::2], strict=True))


def random_stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """Return a random generator for one image and purpose, so that results do not depend on the order of work."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *purpose.encode()])


def make_scenes(output: Path, counts: dict[str, int], recipe: Recipe, processes: int) -> None:
    """Write the folder ``output``; the files do not depend on the number of processes.

    Raises:
        InputError: ``output`` exists or cannot be created.
    """
    jobs = plan(counts, recipe)
    by_split = {split: [job for job in jobs if job.split == split] for split in SPLITS}
    with atomic_folder(output) as root:
        for folder in ("images", "features", "entities/Sentences", "entities/Annotations", "winoground"):
            (root / folder).mkdir(parents=True)
        drawn = in_order(partial(write_image, root, recipe=recipe), jobs, processes, option="--workers")
        images = list(tqdm(drawn, total=len(jobs), desc="drawing scenes", unit="image", disable=None))
        dataset = json.dumps({"dataset": "scenes", "images": images}, indent=1)
        (root / "dataset_scenes.json").write_text(dataset, encoding="utf-8")
        pairs = [pair for jobs in by_split.values() for twins in twins_of(jobs) for pair in permutations(twins)]
        neighbours = {f"{one.stem}.npz": [f"{other.stem}.npz"] for one, other in pairs}
        (root / "twins.json").write_text(json.dumps(neighbours, indent=1), encoding="utf-8")
        examples = write_winoground(root / "winoground" / "examples.jsonl", by_split["test"], recipe)
        filled = {**vars(recipe), "items": "{} {}".format(*recipe.items), "images": len(jobs), "examples": examples, **counts}
        (root / "README.txt").write_text(README.format(**filled), encoding="utf-8")


def write_image(root: Path, job: Job, recipe: Recipe) -> dict[str, Any]:
    """Write the picture, features and Entities files of an image; return its entry in Karpathy's JSON."""
    scene = scene_of(job, recipe)
    captions = captions_of(job, scene, recipe)
    filename = f"{job.stem}.jpg"
    picture_path = root / "images" / filename
    # Twins share their background, so that only the two positions tell them apart.
    purpose, number = ("look", job.index) if job.pair is None else ("twin look", job.pair[0])
    draw_picture(scene, random_stream(recipe.seed, job.split, number, purpose)).save(picture_path, quality=92, subsampling=0)

    boxes, conf = propose_boxes(scene, random_stream(recipe.seed, job.split, job.index, "boxes"))
    with Image.open(picture_path) as picture:  # as any other reader would see it, with the loss of JPEG
        features = region_features(picture.convert("RGB"), boxes)
    record = {"features": features, "norm_bb": normalised(boxes), "conf": conf.astype(np.float16)}
    np.savez(root / "features" / f"{job.stem}.npz", **record)
    _write_entities(root / "entities", job, filename, scene, captions)

    sentids = [job.imgid * CAPTIONS + number for number in range(len(captions))]
    sentences = [
        {"tokens": caption.tokens, "raw": caption.raw, "imgid": job.imgid, "sentid": sentid}
        for sentid, caption in zip(sentids, captions, strict=True)
    ]
    return {"filename": filename, "imgid": job.imgid, "split": job.split, "sentids": sentids, "sentences": sentences}


def write_winoground(path: Path, jobs: list[Job], recipe: Recipe) -> int:
    """Write one line per pair of swapped captions, two per twin pair among ``jobs``; return the number of lines."""
    examples: list[dict[str, Any]] = []
    for pair in twins_of(jobs):
        captions = [captions_of(job, scene_of(job, recipe), recipe)[:2] for job in pair]
        for caption_0, caption_1 in zip(*captions, strict=True):
            fixed = {"tag": "Noun Phrase", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
            texts = {"caption_0": caption_0.raw, "caption_1": caption_1.raw}
            examples.append({"id": len(examples), "image_0": pair[0].stem, "image_1": pair[1].stem, **texts, **fixed})
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return len(examples)


def _write_entities(root: Path, job: Job, filename: str, scene: Scene, captions: list[Caption]) -> None:
    """Write ``Sentences/<stem>.txt`` and ``Annotations/<stem>.xml``; the chain of the whole scene has no box."""
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

    objects = []
    for index, item in enumerate(scene.items):
        names = "".join(f"<name>{chain}</name>" for members, chain in chains.items() if index in members)
        edges = zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)
        objects.append(f"{names}<bndbox>{''.join(f'<{tag}>{round(edge)}</{tag}>' for tag, edge in edges)}</bndbox>")
    if () in chains:
        objects.append(f"<name>{chains[()]}</name><scene>1</scene><nobndbox>1</nobndbox>")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    lines = [f"<filename>{filename}</filename>", size, *(f"<object>{entry}</object>" for entry in objects)]
    text = "".join(f"  {line}\n" for line in lines)
    (root / "Annotations" / f"{job.stem}.xml").write_text(f"<annotation>\n{text}</annotation>", encoding="utf-8")

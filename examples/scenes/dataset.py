"""The scenes dataset: its images, their scenes and captions, all functions of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.scenes.captions import Caption, swap_roles, write_captions
from examples.scenes.layout import Scene, draw_scene, draw_twins

SPLITS = ("train", "val", "test")


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

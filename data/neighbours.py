"""Images that are always among each other's negatives, such as pictures that differ in one thing, and their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.text_db import is_text_list
from utils.errors import InputError
from utils.files import read_json, short_repr

_NONE = np.empty(0, np.int64)


def read_neighbours(path: Path | str) -> dict[str, list[str]]:
    """A JSON file of images and the names of those that are always among their negatives.

    Raises:
        InputError: it is anything else, or an image is its own neighbour or has one twice.
    """
    neighbours = read_json(path)
    if not isinstance(neighbours, dict):
        raise InputError(f"{path}: expected a JSON object, images to lists of images")
    for image, names in neighbours.items():
        if not is_text_list(names) or len({image, *names}) <= len(names):
            raise InputError(
                f"{path}: {short_repr(image)} has {short_repr(names)}, expected a list of different images, itself not among them"
            )
    return neighbours


class Neighbours:
    """The neighbours among one source's images, and the texts that a worker has of them, all by number.

    False where there are none.

    Args:
        of_names: by an image's name, the names of its neighbours; those that the source does not have do not count.
        names: index of each of the source's images.
        texts: the worker's texts, one image's behind the other's.
        starts: (images + 1,), where in ``texts`` those of each image begin.
    """

    def __init__(
        self, of_names: Mapping[str, Sequence[str]], names: Mapping[str, int], texts: np.ndarray, starts: np.ndarray
    ) -> None:
        self._texts, self._starts = texts, starts
        self._images: dict[int, np.ndarray] = {}
        for name, others in of_names.items():
            image = names.get(name)
            near = [names[other] for other in others if other in names]
            if image is not None and near:
                self._images[image] = np.array(near)

    def __bool__(self) -> bool:
        return bool(self._images)

    def images(self, image: int) -> np.ndarray:
        """The neighbours of an image."""
        return self._images.get(image, _NONE)

    def texts_like(self, text: int, image: int) -> np.ndarray:
        """For a text of ``image``, one of each neighbour that has any: the n-th of the one goes with the n-th of the other."""
        near = self.images(image)
        counts = self._starts[near + 1] - self._starts[near]
        near, counts = near[counts > 0], counts[counts > 0]
        own = self._texts[self._starts[image] : self._starts[image + 1]]
        rank = int((own == text).argmax())
        return self._texts[self._starts[near] + rank % counts]

"""Write five true captions of a scene: relations between two items, between three, a list, and a count.

A caption is a list of segments, from which its text, its tokens and its line in the format of Flickr30k Entities are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.scenes.scene import OPPOSITE, Scene, relations

WORDINGS = {
    "left": ("to the left of", "on the left of"),
    "right": ("to the right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
PLURALS = {"cross": "crosses"}
# No template for two items starts or ends with an item: with its capital letter or full stop, the two captions of a twin pair
# would differ in more than the order of their words.
TWO_ITEMS = (
    "There is {a} {rel} {b} here .",
    "There is {a} {rel} {b} in {scene} .",
    "We can see {a} {rel} {b} in {scene} .",
    "In {scene} , {a} {rel} {b} can be seen .",
)
THREE_ITEMS = (
    "There is {a} {rel} {b} and {rel2} {c} .",
    "{scene} shows {a} {rel} {b} and {rel2} {c} .",
    "{a} is {rel} {b} and {rel2} {c} .",
)
LIST = (
    "There is {a} together with {b} and {c} .",
    "{scene} contains {a} , {b} and {c} .",
    "We can see {a} , {b} and also {c} .",
    "{a} appears along with {b} and {c} .",
)
COUNT_ALL = (
    "There are {n} , including {a} and {b} .",
    "{n} are scattered around , among them {a} and {b} .",
    "{scene} has {n} in it , such as {a} and {b} .",
)
COUNT_SHAPE = (
    "There are {n} , and also {a} and {b} .",
    "{scene} contains {n} as well as {a} and {b} .",
    "We count {n} besides {a} and {b} .",
)
CAPTIONS = 5
SCENE_WORDS = ("The picture", "This picture", "The drawing")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and the indices of the items it refers to; none for a phrase that refers to the whole picture."""

    text: str
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Caption:
    """A sentence of words and phrases."""

    segments: tuple[str | Phrase, ...]

    @property
    def raw(self) -> str:
        text = " ".join(segment if isinstance(segment, str) else segment.text for segment in self.segments)
        return text.replace(" ,", ",").replace(" .", ".")

    @property
    def tokens(self) -> list[str]:
        """Lower-case words without punctuation, as in Karpathy's files."""
        return self.raw.lower().replace(",", "").replace(".", "").split()


def write_captions(scene: Scene, relations: int, rng: np.random.Generator) -> list[Caption]:
    """Return five different captions, the first ``relations`` of which relate two items.

    In a scene with a twin, these relate the two swapped items, alternately in both directions.
    """
    order = rng.permutation(len(scene.items)).tolist()
    if scene.swap is None:
        pairs = [(order[number % len(order)], order[(number + 1) % len(order)]) for number in range(relations)]
        picked = [(*pair, _any_relation(scene, *pair, rng)) for pair in pairs]
    else:
        first, relation, second = scene.swap
        both = [(first, second, relation), (second, first, OPPOSITE[relation])]
        picked = [both[number % 2] for number in range(relations)]
    captions: list[Caption] = []
    while len(captions) < relations:
        caption = _two_items(scene, *picked[len(captions)], rng)
        if caption not in captions:
            captions.append(caption)
    return captions + [write(scene, rng) for write in (_three_items, _list, _count)[: CAPTIONS - relations]]


def swap_roles(caption: Caption) -> Caption:
    """Exchange the two items of a relation: the same words, true of the twin and false of the scene."""
    first, second = (segment for segment in caption.segments if isinstance(segment, Phrase) and segment.items)
    exchanged: dict[str | Phrase, Phrase] = {first: second, second: first}
    return Caption(tuple(exchanged.get(segment, segment) for segment in caption.segments))


def _two_items(scene: Scene, first: int, second: int, relation: str, rng: np.random.Generator) -> Caption:
    a, b = _mention(scene, first, rng), _mention(scene, second, rng)
    return _fill(_pick(TWO_ITEMS, rng), rng, a=a, b=b, rel=_pick(WORDINGS[relation], rng))


def _three_items(scene: Scene, rng: np.random.Generator) -> Caption:
    a, b, c = _mentions(scene, 3, rng)
    both = [_any_relation(scene, *a.items, *other.items, rng) for other in (b, c)]
    rel, rel2 = (_pick(WORDINGS[relation], rng) for relation in both)
    return _fill(_pick(THREE_ITEMS, rng), rng, a=a, b=b, c=c, rel=rel, rel2=rel2)


def _list(scene: Scene, rng: np.random.Generator) -> Caption:
    a, b, c = _mentions(scene, 3, rng)
    return _fill(_pick(LIST, rng), rng, a=a, b=b, c=c)


def _count(scene: Scene, rng: np.random.Generator) -> Caption:
    """Count a shape that several items have and at least two others have not; without such a shape, count all items."""
    numbers = Counter(item.shape for item in scene.items)
    countable = [shape for shape, number in numbers.items() if 2 <= number <= len(scene.items) - 2]
    shape = _pick(countable, rng) if countable else None
    a, b = _mentions(scene, 2, rng, leave_out=shape)
    members = tuple(index for index, item in enumerate(scene.items) if shape in (None, item.shape))
    noun = PLURALS.get(shape, f"{shape}s") if shape else "shapes"
    group = Phrase(f"{NUMBERS[len(members)]} {noun}", members)
    return _fill(_pick(COUNT_SHAPE if shape else COUNT_ALL, rng), rng, a=a, b=b, n=group)


def _mention(scene: Scene, index: int, rng: np.random.Generator) -> Phrase:
    item = scene.items[index]
    words = [*([item.size] if rng.random() < 0.75 else []), item.colour, item.shape]
    return Phrase(" ".join(["an" if words[0][0] in "aeiou" else "a", *words]), (index,))


def _mentions(scene: Scene, number: int, rng: np.random.Generator, leave_out: str | None = None) -> list[Phrase]:
    """Mention ``number`` different items in random order."""
    indices = [index for index, item in enumerate(scene.items) if item.shape != leave_out]
    return [_mention(scene, index, rng) for index in rng.permutation(indices)[:number].tolist()]


def _any_relation(scene: Scene, first: int, second: int, rng: np.random.Generator) -> str:
    return _pick(relations(scene.items[first].box, scene.items[second].box), rng)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def _fill(template: str, rng: np.random.Generator, **slots: str | Phrase) -> Caption:
    """Replace the ``{slots}`` of a template, and make its first letter a capital."""
    segments: list[str | Phrase] = []
    for word in template.split():
        if word == "{scene}":
            text = _pick(SCENE_WORDS, rng)
            segments.append(Phrase(text if not segments else text[0].lower() + text[1:]))
        else:
            segments.append(slots[word.strip("{}")] if word.startswith("{") else word)
    if isinstance(segments[0], Phrase):
        text = segments[0].text
        segments[0] = Phrase(text[0].upper() + text[1:], segments[0].items)
    return Caption(tuple(segments))

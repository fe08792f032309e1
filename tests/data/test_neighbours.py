"""Images that are always among the negatives of others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.datasets import HardNegativeDataset
from data.neighbours import read_neighbours
from data.split import RetrievalSplit
from tests.conftest import BUNDLED
from utils.errors import InputError


@pytest.fixture
def source() -> RetrievalSplit:
    return RetrievalSplit(str(BUNDLED.text_db), str(BUNDLED.image_db), BUNDLED.config.input_limits)


def task(
    source: RetrievalSplit, neighbours: dict[str, list[str]], *, negative_size: int = 6, **more: int
) -> HardNegativeDataset:
    return HardNegativeDataset([source], negative_size=negative_size, micro_steps=40, seed=3, neighbours=neighbours, **more)


def test_they_or_a_text_of_each_come_first_and_the_rest_is_drawn_from_others(source: RetrievalSplit) -> None:
    names = list(source.image_names)
    twin = {name: names[(place + 1) % len(names)] for place, name in enumerate(names)}
    texts_of = {
        name: [t for t, i in zip(source.text_db.ids, source.image_of, strict=True) if names[i] == name] for name in names
    }
    made = task(source, {name: [other, "of another database.npz"] for name, other in twin.items()})
    for step in range(made.passes):
        (_, positive, image), *others = made.candidates("image", step)
        texts = [text for _, text, _ in others]
        assert texts[0] == texts_of[twin[image]][texts_of[image].index(positive)]
        assert len({positive, *texts}) == 1 + made.negative_size
        assert not set(texts) & set(texts_of[image])

        (_, text, image), *others = made.candidates("text", step)
        negatives = [name for _, _, name in others]
        assert negatives[0] == twin[image]
        assert len({image, *negatives}) == 1 + made.negative_size
        assert {other for _, other, _ in others} == {text}


def test_of_more_than_there_is_room_for_a_different_part_each_time(source: RetrievalSplit) -> None:
    names = list(source.image_names)
    neighbours = {name: [other for other in names[:8] if other != name] for name in names}
    seen: set[str] = set()
    made = task(source, neighbours, negative_size=3)
    for step in range(made.passes):
        negatives = {name for _, _, name in made.candidates("text", step)[1:]}
        assert len(negatives) == 3
        assert negatives <= set(names[:8])
        seen |= negatives
    assert seen == set(names[:8])


def test_other_workers_texts_are_not_drawn(source: RetrievalSplit) -> None:
    names = list(source.image_names)
    neighbours = {name: [names[place - 1]] for place, name in enumerate(names)}
    made = task(source, neighbours, negative_size=3, rank=1, world_size=2)
    own = {source.text_db.ids[place] for place in made.texts[0]}
    assert all({text for _, text, _ in made.candidates("image", step)} <= own for step in range(made.passes))


def test_files_that_are_no_neighbours(source: RetrievalSplit, tmp_path: Path) -> None:
    file = tmp_path / "twins.json"
    for contents in ("[]", '{"a": "b"}', '{"a": ["a"]}', '{"a": ["b", "b"]}', '{"a": [1]}'):
        file.write_text(contents)
        with pytest.raises(InputError, match=r"twins\.json: .*expected"):
            read_neighbours(file)
    file.write_text(json.dumps({"a": ["b"], "c": []}))
    assert read_neighbours(file) == {"a": ["b"], "c": []}
    with pytest.raises(InputError, match="neighbours: has 'a' and the like, expected images of the training databases, like "):
        task(source, read_neighbours(file))


def test_halves_hold_them(source: RetrievalSplit) -> None:
    """What is scored is what was drawn."""
    names = list(source.image_names)
    made = task(source, {name: [names[place - 1]] for place, name in enumerate(names)})
    half = made[1]
    batch = half.batch
    images = [batch.image_names[image] for image in batch.pairs[:, 1].tolist()]
    assert images == [name for _, _, name in made.candidates("text", 0)]
    assert len(np.unique(images)) == 1 + made.negative_size


def test_a_text_is_followed_by_one_of_each_neighbour(source: RetrievalSplit) -> None:
    names = list(source.image_names)
    twin = {name: names[place ^ 1] for place, name in enumerate(names[: len(names) // 2 * 2])}
    made = HardNegativeDataset(
        [source], negative_size=2, micro_steps=2 * len(source.text_db), neighbours={a: [b] for a, b in twin.items()}
    )
    for anchor in ("image", "text"):
        drawn = [made.candidates(anchor, step)[0][1:] for step in range(len(source.text_db))]
        assert {text for text, _ in drawn} == set(source.text_db.ids)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        assert all(twin[one] == other for (_, one), (_, other) in pairs)
        assert all(int(one) % 5 == int(other) % 5 for (one, _), (other, _) in pairs)
        again = [made.candidates(anchor, len(source.text_db) + step)[0][1] for step in range(20)]
        assert again != [text for text, _ in drawn[:20]]

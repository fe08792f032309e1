"""What training draws, and that every user's mistake with the databases is met before it starts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from data.batch import PairBatch
from data.datasets import Anchor, BlockDataset, HardNegativeDataset, draw_others, read_neighbours
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import RetrievalSplit
from tests.conftest import BUNDLED, CPU
from utils.errors import InputError

ANCHORS = get_args(Anchor)
TEXTS_OF = json.loads((BUNDLED.text_db / "img2txts.json").read_text())


@pytest.fixture(scope="module")
def split() -> RetrievalSplit:
    """40 images with five texts each."""
    return BUNDLED.source()


def dataset_of(*splits: RetrievalSplit, **changes: Any) -> HardNegativeDataset:
    return HardNegativeDataset(splits, **{"negative_size": 23, "micro_steps": 400, "seed": 1, **changes})


def assert_same(batch: PairBatch, expected: PairBatch) -> None:
    assert (batch.text_ids, batch.image_names) == (expected.text_ids, expected.image_names)
    for rows in (attrgetter(name) for name in ("tokens.rows", "features.rows", "features.lengths", "boxes", "pairs")):
        assert torch.equal(rows(batch), rows(expected))


def test_candidates_are_one_positive_and_different_negatives(split: RetrievalSplit) -> None:
    dataset = dataset_of(split)
    for step in range(50):
        (_, text, image), *negatives = dataset.candidates("image", step)
        assert text in TEXTS_OF[image]
        assert len({other for _, other, _ in negatives} - {*TEXTS_OF[image]}) == 23
        assert {other for _, _, other in negatives} == {image}
        (_, text, image), *negatives = dataset.candidates("text", step)
        assert text in TEXTS_OF[image]
        assert len({other for _, _, other in negatives} - {image}) == 23
        assert {other for _, other, _ in negatives} == {text}


def test_each_epoch_and_each_kind_of_half_is_a_shuffle_of_its_own(split: RetrievalSplit) -> None:
    dataset = dataset_of(split)
    drawn = [[dataset.candidates(anchor, step)[0][1] for step in range(400)] for anchor in ANCHORS]
    epochs = [texts[first : first + 200] for texts in drawn for first in (0, 200)]
    assert all(sorted(texts) == sorted(split.text_db.ids) for texts in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert dataset.candidates("text", 7) == dataset_of(split).candidates("text", 7)
    assert dataset.candidates("text", 7) != dataset_of(split, seed=2).candidates("text", 7)


def test_ranks_divide_the_texts(split: RetrievalSplit) -> None:
    datasets = [dataset_of(split, rank=rank, world_size=3) for rank in range(3)]
    shards = [{split.text_db.ids[index] for index in dataset.texts[0]} for dataset in datasets]
    assert sorted(text for shard in shards for text in shard) == sorted(split.text_db.ids)
    assert {text for step in range(20) for _, text, _ in datasets[1].candidates("image", step)} <= shards[1]
    assert datasets[0].candidates("text", 0) != datasets[1].candidates("text", 0)


def test_fingerprints_are_those_of_earlier_versions(split: RetrievalSplit) -> None:
    """Saved training states and partial evaluations are compared with them."""
    assert split.fingerprint() == {
        "txt_db": "2a22f9722f375566db9f013704e7afb44b735e7004a3ab1ea3b51412871a6a4e",
        "img_db": "d5af3f61393c1b9ce4b2646af223e1e24769e5ce44b0d96e7c049434d0b188ca",
    }


def test_negatives_are_uniform() -> None:
    rng, expected = np.random.default_rng(0), 6000 * 3 / 7
    counts = Counter(n for _ in range(6000) for n in draw_others(rng, 10, [2, 3, 9], 3).tolist())
    assert sorted(counts) == [0, 1, 4, 5, 6, 7, 8]
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_each_example_stays_within_its_own_split(split: RetrievalSplit) -> None:
    splits = [split, BUNDLED.source()]
    dataset = dataset_of(*splits, negative_size=5, micro_steps_per_pass=4)
    drawn = [{example[0] for example in dataset.candidates("text", step)} for step in range(400)]
    assert Counter(frozenset(map(splits.index, seen)) for seen in drawn) == {frozenset({0}): 200, frozenset({1}): 200}
    assert dataset[0].batch.pairs.shape == (24, 2)


def test_long_texts_are_left_out_of_training() -> None:
    split = BUNDLED.source(max_txt_len=20)
    lengths = split.text_db.lengths
    assert dataset_of(split).texts[0].tolist() == [index for index, length in enumerate(lengths) if length <= 20]
    assert 0 < len(split.texts) < len(lengths)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_changes_nothing(split: RetrievalSplit, workers: int) -> None:
    dataset = dataset_of(split, micro_steps=4, micro_steps_per_pass=2)
    halves = list(Loader(CPU, workers)(dataset))
    assert [half.anchor for half in halves] == ["image", "text"] * 2
    for index, half in enumerate(halves):
        assert_same(half.batch, dataset[index].batch)


def test_blocks_cover_the_split_in_order(split: RetrievalSplit) -> None:
    assert [text for batch in Loader(CPU, 1)(BlockDataset(split, "texts", 7)) for text in batch.text_ids] == split.text_db.ids
    for size in (7, 400):
        blocks = Loader(CPU)(BlockDataset(split, "images", size))
        assert [name for batch in blocks for name in batch.image_names] == split.image_names


def test_an_error_in_a_worker_stays_one_line() -> None:
    split = BUNDLED.source()
    split.limits = split.limits._replace(img_dim=2048)
    with pytest.raises(InputError, match=r"^image '.*' has features of width \d+, the model has img_dim 2048"):
        next(iter(Loader(CPU, 1)(dataset_of(split))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_size": 39, "world_size": 6}, r"34 texts per rank \(of 6\).*expected negative_size 39"),
        ({"max_txt_len": 1}, "0 texts"),
        ({"neighbours": {"a": ["b"]}}, "neighbours: names no image of the training databases; has 'a', expected names like '"),
    ],
)
def test_too_little_to_draw_from(changes: dict[str, Any], message: str) -> None:
    split = BUNDLED.source(changes.pop("max_txt_len", -1))
    with pytest.raises(InputError, match=message):
        dataset_of(split, **changes)


def test_databases_must_fit_the_model() -> None:
    def opened(max_txt_len: int = -1, **change: int) -> RetrievalSplit:
        limits = replace(BUNDLED.config, **change).input_limits
        return RetrievalSplit(str(BUNDLED.text_db), str(BUNDLED.image_db), limits, max_txt_len=max_txt_len)

    with pytest.raises(InputError, match="vocabulary of 28996, the model has 1000"):
        opened(vocab_size=1000)
    with pytest.raises(InputError, match=r"text '\d+' has \d+ word pieces, expected at most 18"):
        opened(max_position_embeddings=20)


def test_neighbours_or_a_text_of_each_come_first(split: RetrievalSplit) -> None:
    twin = {name: split.image_names[index - 1] for index, name in enumerate(split.image_names)}
    neighbours = {name: [other, "of another database.npz"] for name, other in twin.items()}
    dataset = dataset_of(split, negative_size=6, neighbours=neighbours)
    own = dataset_of(split, negative_size=3, neighbours=neighbours, rank=1, world_size=2)
    texts_of_rank = {split.text_db.ids[index] for index in own.texts[0]}
    for step in range(40):
        (_, positive, image), *others = dataset.candidates("image", step)
        texts = [text for _, text, _ in others]
        assert texts[0] == TEXTS_OF[twin[image]][TEXTS_OF[image].index(positive)]
        assert len({*texts, *TEXTS_OF[image]}) == 6 + 5
        (_, _, image), *others = dataset.candidates("text", step)
        assert others[0][2] == twin[image]
        assert len({image, *(name for _, _, name in others)}) == 1 + 6
        assert {text for _, text, _ in own.candidates("image", step)} <= texts_of_rank
    batch = dataset[1].batch
    assert [batch.image_names[image] for image in batch.pairs[:, 1]] == [name for _, _, name in dataset.candidates("text", 0)]


def test_too_many_neighbours_take_turns(split: RetrievalSplit) -> None:
    first = split.image_names[:8]
    neighbours = {name: [other for other in first if other != name] for name in split.image_names}
    dataset = dataset_of(split, negative_size=3, micro_steps=40, neighbours=neighbours)
    drawn = [{name for _, _, name in dataset.candidates("text", step)[1:]} for step in range(40)]
    assert all(len(negatives) == 3 for negatives in drawn)
    assert set().union(*drawn) == set(first)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_text_is_followed_by_one_of_each_neighbour(split: RetrievalSplit, anchor: Anchor) -> None:
    twin = {name: split.image_names[index ^ 1] for index, name in enumerate(split.image_names)}
    dataset = dataset_of(split, negative_size=2, neighbours={a: [b] for a, b in twin.items()})
    drawn = [dataset.candidates(anchor, step)[0][1:] for step in range(400)]
    assert {text for text, _ in drawn[:200]} == set(split.text_db.ids)
    for (text, image), (next_text, next_image) in zip(drawn[:200:2], drawn[1:200:2], strict=True):
        assert twin[image] == next_image
        assert int(text) % 5 == int(next_text) % 5
    assert drawn[200:] != drawn[:200]


def test_files_of_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "twins.json"
    for contents in ("[]", '{"a": "b"}', '{"a": ["a"]}', '{"a": ["b", "b"]}', '{"a": [1]}'):
        file.write_text(contents)
        with pytest.raises(InputError, match=r"twins\.json: .*expected"):
            read_neighbours(file)
    file.write_text(json.dumps({"a": ["b"], "c": []}))
    assert read_neighbours(file) == {"a": ["b"], "c": []}


@pytest.mark.parametrize("count", [1, 2], ids=["one split", "two splits with the same names"])
def test_images_held_in_memory_make_the_same_halves(count: int) -> None:
    splits = [BUNDLED.source() for _ in range(count)]
    dataset = dataset_of(*splits, negative_size=5, micro_steps=6, micro_steps_per_pass=3)
    expected = [dataset[index].batch for index in range(len(dataset))]
    cache = ImageCache.of(splits, Loader(CPU), 1 << 30)
    assert cache is not None
    assert len(cache.features.lengths) == count * 40
    dataset.without_images = True
    for index, batch in enumerate(expected):
        bare = dataset[index]
        assert len(bare.batch.features.rows) == 0
        assert_same(cache.fill(bare).batch, batch)


def test_too_many_images_are_not_held(split: RetrievalSplit) -> None:
    size = sum(split.image_db[name].features.nbytes + split.image_db[name].boxes.nbytes for name in split.image_names)
    assert ImageCache.of([split], Loader(CPU), size) is not None
    assert ImageCache.of([split], Loader(CPU), size - 1) is None
    assert ImageCache.of([split], Loader(CPU), 0) is None

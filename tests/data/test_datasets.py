"""What training draws, and that every user's mistake with the databases is met before it starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import AnchorBatch
from data.datasets import BlockDataset, HardNegativeDataset, draw_others
from data.loader import Loader
from data.split import RetrievalSplit
from tests.conftest import CPU, Golden
from utils.errors import InputError


def task_of(bundled: Golden, max_txt_len: int = -1, **changes: int) -> HardNegativeDataset:
    settings = {"negative_size": 23, "micro_steps": 400, "seed": 1} | changes
    return HardNegativeDataset([bundled.source(max_txt_len)], **settings)  # type: ignore[arg-type]


def test_candidates_are_one_positive_and_different_negatives(bundled: Golden) -> None:
    task = task_of(bundled)
    source = bundled.source()
    image_of = {text_id: source.image_names[image] for text_id, image in zip(source.text_db.ids, source.image_of, strict=True)}
    for step in range(50):
        for anchor in ("image", "text"):
            (_, text_id, name), *negatives = task.candidates(anchor, step)  # type: ignore[arg-type]
            assert image_of[text_id] == name
            assert len(set(negatives)) == 23
            for _, other_text, other_name in negatives:
                if anchor == "image":
                    assert other_name == name
                    assert image_of[other_text] != name
                else:
                    assert other_text == text_id
                    assert other_name != name


@pytest.mark.parametrize("anchor", ["image", "text"])
def test_each_epoch_is_a_shuffle_of_its_own(bundled: Golden, anchor: str) -> None:
    task = task_of(bundled)
    drawn = [task.candidates(anchor, step)[0][1] for step in range(400)]  # type: ignore[arg-type]
    assert sorted(drawn[:200]) == sorted(drawn[200:]) == sorted(task.sources[0].text_db.ids)
    assert drawn[:200] != drawn[200:]


def test_the_two_halves_walk_through_different_shuffles(bundled: Golden) -> None:
    task = task_of(bundled)
    assert [task.candidates("image", s)[0][1] for s in range(200)] != [task.candidates("text", s)[0][1] for s in range(200)]


def test_workers_share_the_texts_out(bundled: Golden) -> None:
    tasks = [task_of(bundled, rank=rank, world_size=3) for rank in range(3)]
    parts = [[task.sources[0].text_db.ids[place] for place in task.texts[0]] for task in tasks]
    assert sorted(text for part in parts for text in part) == sorted(bundled.source().text_db.ids)
    mine = set(parts[1])
    assert all(text in mine for _, text, _ in tasks[1].candidates("image", 0))
    assert tasks[0].candidates("text", 0) != tasks[1].candidates("text", 0)


def test_sampling_is_a_function_of_seed_and_step(bundled: Golden) -> None:
    def names(seed: int) -> list[tuple[str, str]]:
        return [(text, image) for _, text, image in task_of(bundled, seed=seed).candidates("text", 7)]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_negatives_are_uniform() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(n for _ in range(6000) for n in draw_others(rng, 10, [2, 3, 9], 3).tolist())
    assert sorted(counts) == [0, 1, 4, 5, 6, 7, 8]
    expected = 6000 * 3 / 7
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_each_example_stays_within_its_own_database(bundled: Golden) -> None:
    sources = [bundled.source(), bundled.source()]
    task = HardNegativeDataset(sources, negative_size=5, micro_steps=400, micro_steps_per_pass=4)
    seen = Counter()
    for step in range(400):
        candidates = task.candidates("text", step)
        assert len({source for source, _, _ in candidates}) == 1
        seen[sources.index(candidates[0][0])] += 1
    assert seen == {0: 200, 1: 200}
    assert task[0].batch.pairs.shape == (24, 2)


def test_long_texts_are_left_out_of_training(bundled: Golden) -> None:
    lengths = bundled.source().text_db.lengths
    task = task_of(bundled, max_txt_len=20)
    assert task.texts[0].tolist() == [place for place, length in enumerate(lengths) if length <= 20]
    assert 0 < len(task.texts[0]) < len(lengths)


@pytest.mark.parametrize("workers", [0, 2])
def test_number_of_loader_workers_changes_nothing(bundled: Golden, workers: int) -> None:
    task = task_of(bundled, micro_steps=4, micro_steps_per_pass=2)
    halves = list(Loader(CPU, workers)(task))
    assert [half.anchor for half in halves] == ["image", "text"] * 2
    for number, half in enumerate(halves):
        expected = task[number]
        assert isinstance(half, AnchorBatch)
        assert half.batch.text_ids == expected.batch.text_ids
        assert torch.equal(half.batch.features.rows, expected.batch.features.rows)
        assert torch.equal(half.batch.pairs, expected.batch.pairs)


def test_blocks_cover_the_split_in_order(bundled: Golden) -> None:
    source = bundled.source()
    texts = [text for batch in Loader(CPU, 1)(BlockDataset(source, "texts", 7)) for text in batch.text_ids]
    images = [name for batch in Loader(CPU)(BlockDataset(source, "images", 400)) for name in batch.image_names]
    assert texts == list(source.text_db.ids)
    assert images == list(source.image_names)


def test_error_in_a_worker_process_stays_one_line(bundled: Golden) -> None:
    task = task_of(bundled, micro_steps=2)
    task.sources[0].config = replace(bundled.config, img_dim=2048)
    with pytest.raises(InputError, match=r"features of width \d+, the model has img_dim 2048") as caught:
        next(iter(Loader(CPU, 1)(task)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_size": 40}, "40 images, expected more than negative_size 40"),
        ({"negative_size": 39, "worker": 0, "workers": 6}, r"texts for each of 6 workers.*expected negative_size 39"),
        ({"max_txt_len": 1}, "0 texts"),
    ],
)
def test_too_little_to_draw_from(bundled: Golden, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(bundled, **changes)


def test_a_long_text_that_training_leaves_out_does_no_harm(bundled: Golden) -> None:
    short = replace(bundled.config, max_position_embeddings=20)
    assert RetrievalSplit(str(bundled.text_db), str(bundled.image_db), short.input_limits, max_txt_len=18).texts.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1000}, "vocabulary of 28996, the model has 1000"),
        ({"max_position_embeddings": 20}, r"text '\d+' has \d+ word pieces, expected at most 18"),
    ],
)
def test_model_too_small_for_the_texts(bundled: Golden, change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RetrievalSplit(str(bundled.text_db), str(bundled.image_db), replace(bundled.config, **change).input_limits)

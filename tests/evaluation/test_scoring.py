"""Which pairs are scored, and the alignment of matched pairs against the naive twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.image_db import Image, ImageDatabase
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation import scoring
from evaluation.alignment import alignment_of_positives
from evaluation.candidates import Candidates
from evaluation.scoring import sampled_candidates, score_matrix
from evaluation.unfinished import UnfinishedScores
from model.retrieval import ComputeSettings, RetrievalModel
from tests import naive
from tests.conftest import BUNDLED, Golden
from tests.worker import first_texts
from utils.distributed import SingleProcess
from utils.errors import InputError


@pytest.mark.parametrize("count", [2, 7, 40, 1000])
def test_quick_validation_draws_its_candidates(bundled: Golden, count: int) -> None:
    source = bundled.source()
    candidates = sampled_candidates(source, count)
    rows = candidates.places.reshape(len(source.text_db), min(count, 40))
    for row, own in zip(rows.tolist(), source.image_of.tolist(), strict=True):
        assert own in row
        assert row == sorted(set(row) & set(range(40)))
    assert candidates.fingerprint() == sampled_candidates(source, count).fingerprint()
    if count == 7:
        assert len({row.tobytes() for row in rows}) > 150


def ragged(source: RetrievalSplit) -> Candidates:
    """From none to six images of each text, of 31 images; two blocks of texts have none at all."""
    rng = np.random.default_rng(3)
    kept = np.delete(np.arange(40), [0, 7, 8, 20, 21, 22, 33, 38, 39])
    return Candidates.of(
        [
            rng.choice(kept, rng.integers(0, 7) if not 16 <= text < 48 else 0, replace=False)
            for text in range(len(source.text_db))
        ]
    )


@pytest.mark.parametrize("block", [5, 256])
def test_only_candidates_are_scored_and_only_their_images_read(
    bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    source, model = bundled.source(), bundled.model()
    candidates = ragged(source)
    rows = [BUNDLED.arrays["eval/txt_ids"].tolist().index(name) for name in source.text_db.ids]
    columns = [BUNDLED.arrays["eval/img_ids"].tolist().index(name) for name in source.image_names]
    every = BUNDLED.arrays["eval/scores"][np.ix_(rows, columns)]
    regions = [len(source.image_db[name].boxes) for name in source.image_names]
    monkeypatch.setattr(scoring, "IMAGES_PER_BLOCK", block)
    read: list[str] = []
    scored: list[int] = []
    look_up, score_pairs = ImageDatabase.__getitem__, RetrievalModel.score

    def reading(self: ImageDatabase, name: str) -> Image:
        read.append(name)
        return look_up(self, name)

    def counting(self: RetrievalModel, embedded: Any, pairs: torch.Tensor, how: ComputeSettings) -> Any:
        scored.append(len(pairs))
        return score_pairs(self, embedded, pairs, how)

    monkeypatch.setattr(ImageDatabase, "__getitem__", reading)
    monkeypatch.setattr(RetrievalModel, "score", counting)
    listed = np.zeros((200, 40), bool)
    for text in range(200):
        listed[text, candidates.of_text(text)] = True
    for cache_bytes in (1 << 30, 50_000):  # all images at once, and part by part
        read.clear()
        scored.clear()
        some = score_matrix(model, source, compute, loader, SingleProcess(), candidates=candidates, cache_bytes=cache_bytes)
        np.testing.assert_allclose(some.scores[listed], every[listed], rtol=1e-5, atol=1e-5)
        assert (some.scores[~listed] == -np.inf).all()
        assert read == [source.image_names[place] for place in np.flatnonzero(listed.any(axis=0))]
        assert sum(scored) == listed.sum()
        assert some.regions.tolist() == np.where(listed.any(axis=0), regions, 0).tolist()
    few = score_matrix(model, first_texts(source, 2), compute, loader, SingleProcess())
    assert few.regions.tolist() == regions


def test_an_interrupted_evaluation_of_candidates_goes_on(
    tmp_path: Path, bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = bundled.source(), bundled.model()
    candidates = ragged(source)
    whole = score_matrix(model, source, compute, loader, SingleProcess(), candidates=candidates).scores
    score_block, done = scoring._score_block, []

    def counted(*arguments: Any) -> np.ndarray:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return score_block(*arguments)

    def unfinished(of: Candidates) -> UnfinishedScores:
        return UnfinishedScores(tmp_path, whole.shape, {"candidates": of.fingerprint()}, of)

    def evaluate() -> np.ndarray:
        with unfinished(candidates) as begun:
            return score_matrix(
                model, source, compute, loader, SingleProcess(), candidates=candidates, into=begun.scores
            ).scores

    monkeypatch.setattr(scoring, "_score_block", counted)
    for time in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate()
        missing = np.isnan(np.load(tmp_path / "scores.partial.npy")).any(axis=1)
        blocks = set(np.flatnonzero(missing) // scoring.TEXTS_PER_BLOCK)
        assert blocks == {0, *range(3, 13)} - {0, *range(3, 2 + 4 * time)}  # 1 and 2 have nothing to score
        done.clear()
    with pytest.raises(InputError, match="of an unfinished evaluation with other candidates, expected the same"):
        unfinished(sampled_candidates(source, 3))
    assert np.array_equal(evaluate(), whole)
    assert len(done) == 3
    assert not list(tmp_path.iterdir())


def test_an_evaluation_of_candidates_that_scored_nothing_leaves_nothing(tmp_path: Path, bundled: Golden) -> None:
    candidates = ragged(bundled.source())
    with pytest.raises(KeyboardInterrupt), UnfinishedScores(tmp_path, (200, 40), {}, candidates):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_scores_that_are_not_finite_are_refused(bundled: Golden, compute: ComputeSettings, loader: Loader) -> None:
    model = bundled.model()
    torch.nn.init.constant_(model.rank_output.bias, float("nan"))
    with pytest.raises(InputError, match=r"the score of text '0' and image .* is not finite"):
        score_matrix(model, bundled.source(), compute, loader, SingleProcess())


def test_alignment_of_positives_is_the_mean_over_pairs(
    bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = bundled.source(), bundled.model()
    shortest = np.argsort(source.text_db.lengths)[:4]
    monkeypatch.setattr(source, "image_of", source.image_of[shortest])
    monkeypatch.setattr(source.text_db, "ids", [source.text_db.ids[place] for place in shortest])
    monkeypatch.setattr(source.text_db, "image_of", source.image_of)
    monkeypatch.setattr("evaluation.alignment.PAIRS_PER_BLOCK", 3)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = {"singular": {"L": 0.0, "V": 0.0}, "distributed": {"L": 0.0, "V": 0.0}}
    for text_id in source.text_db.ids:
        text = source.text_db[text_id]
        image = source.image_db[text.image]
        tokens = [source.text_db.cls_id, *text.input_ids.tolist(), source.text_db.sep_id]
        _, maps = naive.forward(weights, naive.Pair(tokens, image.features, image.boxes), 4, bundled.config.num_hidden_layers)
        for kind, by_way in expected.items():
            for way in by_way:
                by_way[way] += naive.alignment(kind, maps[-1], len(tokens), way) / 4
    measured = alignment_of_positives(model, source, compute, loader, SingleProcess())
    for kind, by_way in expected.items():
        assert measured[kind] == pytest.approx(by_way, rel=1e-3)

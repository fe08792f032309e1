"""Which pairs are scored, and the alignment of matched pairs against the naive twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.names import Names
from evaluation.alignment import alignment_of_positives
from evaluation.score import sampled_candidates, score_matrix
from model.retrieval import Compute
from tests import naive
from tests.conftest import Golden
from utils.distributed import Alone
from utils.errors import InputError


@pytest.mark.parametrize("count", [2, 7, 40, 1000])
def test_quick_validation_draws_its_candidates(bundled: Golden, count: int) -> None:
    source = bundled.source()
    candidates = sampled_candidates(source, count)
    assert candidates.shape == (len(source.text_db), min(count, 40))
    assert np.array_equal(candidates[:, 0], source.image_of)
    for row in candidates:
        assert len(set(row.tolist()) & set(range(40))) == len(row)
    assert np.array_equal(candidates, sampled_candidates(source, count))
    if count == 7:
        assert len({row.tobytes() for row in candidates}) > 150


def test_only_candidates_are_scored(bundled: Golden, compute: Compute, loader: Loader) -> None:
    source, model = bundled.source(), bundled.model()
    candidates = sampled_candidates(source, 5)
    every = score_matrix(model, source, compute, loader, Alone()).scores
    for cache_bytes in (1 << 30, 400_000):  # all images at once, and part by part
        some = score_matrix(model, source, compute, loader, Alone(), candidates=candidates, cache_bytes=cache_bytes).scores
        np.testing.assert_allclose(some, np.take_along_axis(every, candidates, axis=1), rtol=1e-5, atol=1e-5)


def test_scores_that_are_not_finite_are_refused(bundled: Golden, compute: Compute, loader: Loader) -> None:
    model = bundled.model()
    torch.nn.init.constant_(model.rank_output.bias, float("nan"))
    with pytest.raises(InputError, match=r"the score of text '0' and image .* is not finite"):
        score_matrix(model, bundled.source(), compute, loader, Alone())


def test_alignment_of_positives_is_the_mean_over_pairs(
    bundled: Golden, compute: Compute, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = bundled.source(), bundled.model()
    shortest = np.argsort(source.text_db.lengths)[:4]
    monkeypatch.setattr(source, "image_of", source.image_of[shortest])
    monkeypatch.setattr(source.text_db, "ids", Names(source.text_db.ids[place] for place in shortest))
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
    measured = alignment_of_positives(model, source, compute, loader, Alone())
    for kind, by_way in expected.items():
        assert measured[kind] == pytest.approx(by_way, rel=1e-3)

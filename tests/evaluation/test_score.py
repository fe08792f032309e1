"""Which pairs are scored, and the alignment of matched pairs against the naive twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.loader import Loader
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
    wanted = sampled_candidates(source, count)
    assert (wanted.sum(axis=1) == min(count, 40)).all()
    for row, text_id in enumerate(source.text_db.ids):
        assert wanted[row, source.image_names.index(source.text_db.image_of[text_id])]
    assert np.array_equal(wanted, sampled_candidates(source, count))
    if count == 7:
        assert len({row.tobytes() for row in wanted}) > 150


def test_only_wanted_pairs_are_scored(bundled: Golden, compute: Compute, loader: Loader) -> None:
    source, model = bundled.source(), bundled.model()
    wanted = sampled_candidates(source, 5)
    wanted[7] = False
    some = score_matrix(model, source, compute, loader, Alone(), wanted=wanted).scores
    every = score_matrix(model, source, compute, loader, Alone()).scores
    np.testing.assert_allclose(some[wanted], every[wanted], rtol=1e-5, atol=1e-5)
    assert np.isneginf(some[~wanted]).all()


def test_scores_that_are_not_finite_are_refused(bundled: Golden, compute: Compute, loader: Loader) -> None:
    model = bundled.model()
    torch.nn.init.constant_(model.rank_output.bias, float("nan"))
    with pytest.raises(InputError, match=r"the score of text '0' and image .* is not finite"):
        score_matrix(model, bundled.source(), compute, loader, Alone())


def test_alignment_of_positives_is_the_mean_over_pairs(
    bundled: Golden, compute: Compute, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = bundled.source(), bundled.model()
    monkeypatch.setattr(source.text_db, "ids", sorted(source.text_db.ids, key=source.text_db.lengths.__getitem__)[:4])
    monkeypatch.setattr("evaluation.alignment.PAIRS_PER_BLOCK", 3)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = {"singular": {"L": 0.0, "V": 0.0}, "distributed": {"L": 0.0, "V": 0.0}}
    for text_id in source.text_db.ids:
        text, image = source.text_db[text_id], source.image_db[source.text_db.image_of[text_id]]
        tokens = [source.text_db.cls_id, *text.input_ids.tolist(), source.text_db.sep_id]
        _, maps = naive.forward(weights, naive.Pair(tokens, image.features, image.boxes), 4, bundled.config.num_hidden_layers)
        for kind, by_way in expected.items():
            for way in by_way:
                by_way[way] += naive.alignment(kind, maps[-1], len(tokens), way) / 4
    measured = alignment_of_positives(model, source, compute, loader, Alone())
    for kind, by_way in expected.items():
        assert measured[kind] == pytest.approx(by_way, rel=1e-3)

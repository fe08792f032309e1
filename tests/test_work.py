"""How much is computed and read, counted and not timed, so that speed cannot be lost unnoticed.

Rows are those that enter the layers of the encoder: the tokens of padded pairs.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.datasets import HardNegativeDataset
from data.image_db import ImageDatabase
from data.loader import Loader
from data.text_db import TextDatabase
from evaluation.scoring import score_matrix
from model.layers import SelfAttention
from model.objective import Objective
from model.retrieval import ComputeSettings, RetrievalModel
from tests.conftest import Golden
from utils.distributed import SingleProcess

CANDIDATES, HARD = 24, 7


def counted(model: RetrievalModel, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count from now on: rows by layer and kind of work, maps, and records by database."""
    work: Counter[str] = Counter()

    def count(name: str, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        rows = inputs[0].shape[:-1].numel() if inputs[0].is_floating_point() else len(inputs[0])
        work[name + ", with gradient" * torch.is_grad_enabled()] += rows

    counters = {"embedded tokens": model.uniter.embeddings, "embedded regions": model.uniter.img_embeddings}
    for number, layer in enumerate(model.uniter.encoder.layer):
        attention = layer.attention.self
        linear = {"queries": attention.query, "keys": attention.key, "values": attention.value, "widened": layer.intermediate}
        counters |= {f"{name}, layer {number}": module for name, module in linear.items()}
    for name, module in counters.items():
        module.register_forward_hook(partial(count, name))
    for kind, owner, method in (
        ("maps", SelfAttention, "scores"),
        ("text records", TextDatabase, "__getitem__"),
        ("image records", ImageDatabase, "__getitem__"),
    ):
        original = getattr(owner, method)

        def counting(self: Any, key: Any, kind: str = kind, original: Any = original) -> Any:
            work[kind] += len(key) if kind == "maps" else 1
            return original(self, key)

        monkeypatch.setattr(owner, method, counting)
    return work


def test_evaluation(bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is read once, each text and image embedded once, little is padded, the last layer computes [CLS] alone."""
    split, model = bundled.source(), bundled.model()
    texts = split.text_db.lengths + 2
    images = [len(split.image_db[name].boxes) for name in split.image_names]
    work = counted(model, monkeypatch)
    score_matrix(model, split, compute, loader, SingleProcess())
    pairs = len(texts) * len(images)
    real = int(texts.sum()) * len(images) + sum(images) * len(texts)
    assert (work.pop("text records"), work.pop("image records")) == (len(texts), len(images))
    assert (work.pop("embedded tokens"), work.pop("embedded regions")) == (texts.sum(), sum(images))
    last = bundled.config.num_hidden_layers - 1
    assert work.pop(f"queries, layer {last}") == work.pop(f"widened, layer {last}") == pairs
    assert len(work) == 4 * last + 2  # queries, keys, values and widened rows of the other layers; keys and values of the last
    assert all(real <= rows <= 1.03 * real for rows in work.values())
    assert len(set(work.values())) == 1


@pytest.mark.parametrize("number", [0, 1], ids=["image-anchored", "text-anchored"])
def test_half_of_a_micro_step(bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Encode the candidates once without gradient, the hard ones once with; embed each text and image once in both; one map."""
    model, last = bundled.model(), bundled.config.num_hidden_layers - 1
    objective = Objective(hard_neg_size=HARD, margin=0.2, regulariser="singular", layers=(last,))
    work = counted(model, monkeypatch)
    half = HardNegativeDataset([bundled.source()], negative_size=CANDIDATES - 1, micro_steps=1)[number]
    loss = objective(model, half, compute)
    (loss.hinge.mean() + loss.alignment.sum()).backward()
    batch = half.batch
    assert {work.pop("text records"), work.pop("image records")} == {1, CANDIDATES}
    assert work.pop("maps") == 1
    for kept, count, suffix in ((batch.pairs, CANDIDATES, ""), (loss.pairs[0], 1 + HARD, ", with gradient")):
        assert len(kept) == count
        texts, images = (side.unique() for side in kept.unbind(1))
        assert work.pop("embedded tokens" + suffix) == int(batch.tokens.lengths[texts].sum())
        assert work.pop("embedded regions" + suffix) == int(batch.features.lengths[images].sum())
        assert work.pop(f"queries, layer {last}{suffix}") == work.pop(f"widened, layer {last}{suffix}") == count
        real = int(batch.tokens.lengths[kept[:, 0]].sum() + batch.features.lengths[kept[:, 1]].sum())
        padded = [work.pop(name) for name in list(work) if name.endswith(", with gradient") == bool(suffix)]
        assert len(padded) == 4 * last + 2
        assert len(set(padded)) == 1
        assert real <= padded[0] <= 1.25 * real  # few pairs, of very different lengths
    assert not work

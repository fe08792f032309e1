"""How much is computed and read, counted and not timed, so that speed cannot be lost unseen.

Rows are those that go into the layers of the encoder: the tokens of padded pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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


def rows_of(tensor: Tensor) -> int:
    """All dimensions but the last: how many tokens, regions or padded places."""
    return tensor.shape[:-1].numel()


@contextmanager
def counted(model: RetrievalModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count inside: rows by layer and kind of work, records by database."""
    work: Counter[str] = Counter()

    def count(name: str, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        suffix = ", with gradient" if torch.is_grad_enabled() else ""
        work[name + suffix] += rows_of(inputs[0]) if inputs[0].is_floating_point() else len(inputs[0])

    hooks = [
        model.uniter.embeddings.register_forward_hook(partial(count, "embedded tokens")),
        model.uniter.img_embeddings.register_forward_hook(partial(count, "embedded regions")),
    ]
    for number, block in enumerate(model.uniter.encoder.layer):
        attention = block.attention.self
        for name, module in (("queries", attention.query), ("keys", attention.key), ("values", attention.value)):
            hooks.append(module.register_forward_hook(partial(count, f"{name}, layer {number}")))
        hooks.append(block.intermediate.register_forward_hook(partial(count, f"widened, layer {number}")))
    map_of = SelfAttention.scores

    def scores(self: SelfAttention, hidden: Tensor) -> Tensor:
        work["maps"] += len(hidden)
        return map_of(self, hidden)

    monkeypatch.setattr(SelfAttention, "scores", scores)
    for kind, database in (("text records", TextDatabase), ("image records", ImageDatabase)):
        look_up = database.__getitem__

        def counting(self: Any, name: str, kind: str = kind, look_up: Any = look_up) -> Any:
            work[kind] += 1
            return look_up(self, name)

        monkeypatch.setattr(database, "__getitem__", counting)
    yield work
    for hook in hooks:
        hook.remove()


def test_evaluation(bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is read once, each text and image embedded once, little is padded, the last layer computes [CLS] alone."""
    source, model = bundled.source(), bundled.model()
    texts = torch.from_numpy(source.text_db.lengths).long() + 2
    images = torch.tensor([len(source.image_db[name].boxes) for name in source.image_names])
    with counted(model, monkeypatch) as work:
        score_matrix(model, source, compute, loader, SingleProcess())
    pairs = len(texts) * len(images)
    real = int(texts.sum()) * len(images) + int(images.sum()) * len(texts)
    assert work.pop("text records") == len(texts)
    assert work.pop("image records") == len(images)
    assert work.pop("embedded tokens") == int(texts.sum())
    assert work.pop("embedded regions") == int(images.sum())
    last = bundled.config.num_hidden_layers - 1
    for number in range(last):
        computed = {work.pop(f"{kind}, layer {number}") for kind in ("queries", "keys", "values", "widened")}
        assert len(computed) == 1
        assert real <= computed.pop() <= 1.03 * real
    assert work.pop(f"queries, layer {last}") == work.pop(f"widened, layer {last}") == pairs
    assert real <= work.pop(f"keys, layer {last}") == work.pop(f"values, layer {last}") <= 1.03 * real
    assert not work


@pytest.mark.parametrize("number", [0, 1], ids=["image-anchored", "text-anchored"])
def test_half_of_a_micro_step(bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The candidates once without gradient, the hard ones once with; each text and image embedded once in both; one map."""
    model, last = bundled.model(), bundled.config.num_hidden_layers - 1
    objective = Objective(hard_neg_size=HARD, margin=0.2, regulariser="singular", layers=(last,))
    with counted(model, monkeypatch) as work:
        half = HardNegativeDataset([bundled.source()], negative_size=CANDIDATES - 1, micro_steps=1)[number]
        loss = objective(model, half, compute)
        (loss.hinge.mean() + loss.alignment.sum()).backward()
    batch = half.batch
    assert {work.pop("text records"), work.pop("image records")} == {1, CANDIDATES}
    assert work.pop("maps") == 1
    for kept, suffix in ((batch.pairs, ""), (loss.pairs[0], ", with gradient")):
        assert len(kept) == (1 + HARD if suffix else CANDIDATES)
        texts, images = (side.unique() for side in kept.unbind(1))
        assert work.pop("embedded tokens" + suffix) == int(batch.tokens.lengths[texts].sum())
        assert work.pop("embedded regions" + suffix) == int(batch.features.lengths[images].sum())
        real = int(batch.tokens.lengths[kept[:, 0]].sum() + batch.features.lengths[kept[:, 1]].sum())
        padded = {work.pop(f"{kind}, layer {layer}{suffix}") for layer in range(last) for kind in ("queries", "widened")}
        padded |= {work.pop(f"{kind}, layer {layer}{suffix}") for layer in range(last + 1) for kind in ("keys", "values")}
        assert len(padded) == 1
        assert real <= padded.pop() <= 1.25 * real  # few pairs, of very different lengths
        assert work.pop(f"queries, layer {last}{suffix}") == work.pop(f"widened, layer {last}{suffix}") == len(kept)
    assert not work

"""That each option which changes an update reaches it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import Half
from data.tasks import HardNegativeTask
from model.iais import REGULARISERS, alignment_loss
from model.retrieval import Compute
from model.uniter import MapRequest
from optim.schedule import iais_weight, learning_rate
from optim.trainer import Trainer, UpdateTerms, layer_numbers
from tests.conftest import Golden
from utils.errors import InputError
from utils.run_options import TrainOptions


def options_of(**changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "train_txt_dbs": ("t",), "train_img_dbs": ("i",), "val_txt_db": "t", "val_img_db": "i", "output_dir": "o",
        "train_batch_size": 2, "hard_neg_size": 3, "num_train_steps": 10, "warmup_steps": 2, "IAIS": "singular",
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def halves(bundled: Golden, micro_steps_per_pass: int = 1) -> Iterator[Half]:
    task = HardNegativeTask([bundled.source()], negative_size=7, micro_steps=20, micro_steps_per_pass=micro_steps_per_pass)
    return (task[number] for number in range(len(task)))


def one_update(
    bundled: Golden, compute: Compute, monkeypatch: pytest.MonkeyPatch, number: int = 4, **changes: Any
) -> tuple[Trainer, UpdateTerms, dict[str, Tensor]]:
    """The trainer after update ``number``, its terms, and the clipped gradients that the optimiser was given."""
    trainer = Trainer(bundled.model(), options_of(**changes), compute)
    gradients: dict[str, Tensor] = {}
    step = trainer.optimiser.step

    def recording(*args: Any) -> Any:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return step(*args)

    monkeypatch.setattr(trainer.optimiser, "step", recording)
    return trainer, trainer.update(halves(bundled, trainer.options.micro_steps_per_pass), number), gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iais_divide": True},
        {"iais_weight": 3.0, "iais_schedule": "const"},
        {"iais_schedule": "linear"},
        {"iais_schedule": "log", "IAIS": "distributed"},
        {"train_batch_size": 4, "micro_steps_per_pass": 2},
        {"IAIS": None},
        {"mining": "random"},
    ],
    ids=str,
)
def test_loss_is_the_weighted_sum_of_its_terms(
    bundled: Golden, compute: Compute, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The gradient that the optimiser gets is that of the formula, written out here with the objective's raw terms."""
    options = options_of(grad_norm=-1.0, **changes)
    trainer, terms, gradients = one_update(bundled, compute, monkeypatch, grad_norm=-1.0, **changes)
    model = bundled.model()
    source = halves(bundled, options.micro_steps_per_pass)
    total = torch.zeros(())
    for _ in range(2 * options.train_batch_size // options.micro_steps_per_pass):
        half = next(source)
        raw = trainer.objective(model, half, compute)
        weight = options.iais_weight * iais_weight(4, 10, options.iais_schedule)
        weight /= options.train_batch_size if options.iais_divide else 1
        total = total + raw.hinge.mean(dim=1).sum() / options.train_batch_size + weight * raw.alignment.sum()
    total.backward()
    assert float(terms.ranking.sum() + terms.alignment.sum()) == pytest.approx(total.item(), rel=1e-5)
    assert len(terms.ranking) == 2 * options.train_batch_size
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw"])
def test_optimiser_is_the_one_asked_for(bundled: Golden, compute: Compute, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes = {"optim": name, "betas": (0.8, 0.95), "weight_decay": 0.2, "learning_rate": 0.01, "grad_norm": 0.5}
    trainer, terms, gradients = one_update(bundled, compute, monkeypatch, **changes)
    assert {"adam": "Adam", "adamax": "Adamax", "adamw": "BertAdamW"}[name] == type(trainer.optimiser).__name__
    group = trainer.optimiser.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.2)
    assert group["lr"] == terms.learning_rate == learning_rate(5, 0.01, 2, 10)
    assert terms.grad_norm > 0.5
    clipped = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert clipped == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("choice", ["alternate", "L", "V"])
def test_modality_and_layers(bundled: Golden, compute: Compute, choice: str) -> None:
    trainer = Trainer(bundled.model(), options_of(iais_modality=choice, iais_layers=(0, -1)), compute)
    source = halves(bundled)
    for half in (next(source), next(source)):
        modality = {"image": "V", "text": "L"}[half.anchor] if choice == "alternate" else choice
        positive = half.batch.select(half.batch.pairs[:1])
        with torch.no_grad():
            maps = bundled.model()(positive, compute, MapRequest([0], [0, 2])).maps
            length = int(positive.tokens.lengths[0])
            expected = alignment_loss(REGULARISERS["singular"], [maps[0][0], maps[2][0]], length, modality)  # type: ignore[arg-type]
            assert float(trainer.objective(trainer.model, half, compute).alignment[0]) == pytest.approx(
                float(expected), rel=1e-4
            )


def test_a_gradient_that_is_not_finite_ends_the_run(bundled: Golden, compute: Compute) -> None:
    trainer = Trainer(bundled.model(), options_of(learning_rate=1e30), compute)
    source = halves(bundled)
    trainer.update(source, 1)
    with pytest.raises(
        InputError, match=r"update 3 at learning rate .*peak 1e\+30.*: the score of text '.*' and image '.*' is not finite"
    ):
        trainer.update(source, 2)


def test_layer_numbers() -> None:
    assert layer_numbers((-1, 0, 11), 12) == (0, 11)
    with pytest.raises(InputError, match="layer 12, expected -12 to 11"):
        layer_numbers((12,), 12)

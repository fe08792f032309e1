"""Every option that changes an update reaches it; numbers that are not finite are named or skipped."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import AnchorBatch
from data.datasets import HardNegativeDataset
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.iais import REGULARISERS, PairAttention, mean_over_layers
from model.objective import LossTerms, Objective
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import MapRequest
from optim.optimizer import iais_weight, learning_rate
from optim.options import TrainOptions
from optim.trainer import Trainer, UpdateTerms
from tests.conftest import CPU, Golden
from utils.distributed import SingleProcess
from utils.errors import InputError
from utils.precision import Precision


def options_of(**changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "train_txt_dbs": ("t",), "train_img_dbs": ("i",), "val_txt_db": "t", "val_img_db": "i", "output_dir": "o",
        "train_batch_size": 2, "hard_neg_size": 3, "num_train_steps": 10, "warmup_steps": 2, "IAIS": "singular",
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def halves(bundled: Golden, micro_steps_per_pass: int = 1) -> Iterator[AnchorBatch]:
    dataset = HardNegativeDataset(
        [bundled.source()], negative_size=7, micro_steps=20, micro_steps_per_pass=micro_steps_per_pass
    )
    return (dataset[number] for number in range(len(dataset)))


def one_update(
    bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, number: int = 4, **changes: Any
) -> tuple[Trainer, UpdateTerms, dict[str, Tensor]]:
    """The trainer after update ``number``, its terms, and the clipped gradients that the optimizer received."""
    trainer = Trainer(bundled.model(), options_of(**changes), compute, SingleProcess())
    gradients: dict[str, Tensor] = {}
    step = trainer.optimizer.step

    def recording(*args: Any) -> Any:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return step(*args)

    monkeypatch.setattr(trainer.optimizer, "step", recording)
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
    bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The gradient that the optimizer gets is that of the formula, written out here with the objective's raw terms."""
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
def test_optimizer_options(bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes = {"optim": name, "betas": (0.8, 0.95), "weight_decay": 0.2, "learning_rate": 0.01, "grad_norm": 0.5}
    trainer, terms, gradients = one_update(bundled, compute, monkeypatch, **changes)
    assert {"adam": "Adam", "adamax": "Adamax", "adamw": "BertAdamW"}[name] == type(trainer.optimizer).__name__
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.2)
    assert group["lr"] == terms.scalars["lr"] == learning_rate(5, 0.01, 2, 10)
    assert terms.scalars["grad_norm"] > 0.5
    clipped = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert clipped == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("choice", ["alternate", "L", "V"])
def test_modality_and_layers(bundled: Golden, compute: ComputeSettings, choice: str) -> None:
    trainer = Trainer(bundled.model(), options_of(iais_modality=choice, iais_layers=(0, -1)), compute, SingleProcess())
    source = halves(bundled)
    for half in (next(source), next(source)):
        modality = {"image": "V", "text": "L"}[half.anchor] if choice == "alternate" else choice
        positive = half.batch.select(half.batch.pairs[:1])
        with torch.no_grad():
            maps = bundled.model()(positive, compute, MapRequest([0], [0, 2])).maps
            length = int(positive.tokens.lengths[0])
            expected = mean_over_layers(
                REGULARISERS["singular"], [PairAttention.of_map(maps[layer][0], length) for layer in (0, 2)], modality
            )  # type: ignore[arg-type]
            actual = trainer.objective(trainer.model, half, compute).alignment[0]
            assert float(actual) == pytest.approx(float(expected), rel=1e-4)


def test_a_gradient_that_is_not_finite_ends_the_run(bundled: Golden, compute: ComputeSettings) -> None:
    trainer = Trainer(bundled.model(), options_of(learning_rate=1e30), compute, SingleProcess())
    source = halves(bundled)
    trainer.update(source, 1)
    with pytest.raises(
        InputError, match=r"update 3 at learning rate .*peak 1e\+30.*: the score of text '.*' and image '.*' is not finite"
    ):
        trainer.update(source, 2)


def in_fp16() -> ComputeSettings:
    """Half precision with loss scaling; the programs allow it only on CUDA, which test machines lack."""
    return ComputeSettings(Precision("fp16", CPU), ChunkSize())


def test_mining_in_bf16_leaves_the_hard_pass_in_fp32(bundled: Golden, compute: ComputeSettings) -> None:
    half = next(halves(bundled))
    model, objective = bundled.model(), Objective(hard_neg_size=3, margin=0.2)
    exact, rough = (
        objective.mine(model, half, compute),
        objective.mine(model, half, replace(compute, mining=Precision("bf16", CPU))),
    )
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.1, rtol=0.1)
    losses = []
    for how in (compute, replace(compute, mining=Precision("bf16", CPU))):
        torch.manual_seed(0)
        losses.append(objective.loss(model, half, how, exact).hinge)
    assert torch.equal(*losses)


def weights_of(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("what", ["score", "alignment", "gradient"])
def test_fp16_skips_non_finite_updates(bundled: Golden, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    compute = in_fp16()
    trainer = Trainer(bundled.model(), options_of(num_train_steps=100), compute, SingleProcess())
    source = halves(bundled)
    trainer.update(source, 1)
    before, scale = weights_of(trainer), compute.precision.scaler.get_scale()
    with monkeypatch.context() as patch:
        spoil(patch, trainer, what)
        terms = trainer.update(source, 2)
    assert terms.skipped
    assert torch.equal(weights_of(trainer), before)
    assert compute.precision.scaler.get_scale() == scale / 2
    assert not trainer.update(source, 3).skipped
    assert not torch.equal(weights_of(trainer), before)


def test_fp16_does_not_skip_forever(bundled: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(bundled.model(), options_of(num_train_steps=100), in_fp16(), SingleProcess())
    spoil(monkeypatch, trainer, "score")
    source = itertools.cycle(list(halves(bundled))[:4])
    skipped = []

    def train() -> None:
        for number in range(60):
            skipped.append(trainer.update(source, number).skipped)

    with pytest.raises(InputError, match=r"the score of text '\w+' and image '\S+' is not finite"):
        train()
    assert all(skipped)
    assert 20 < len(skipped) < 40


@pytest.mark.parametrize("what", ["score", "alignment", "gradient"])
def test_non_finite_numbers_are_named(
    bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In fp32 the run ends with the names of text and image, and the weights stay as they were."""
    trainer = Trainer(bundled.model(), options_of(), compute, SingleProcess())
    source = list(halves(bundled))
    before = weights_of(trainer)
    text, image = spoil(monkeypatch, trainer, what, source[1])
    with pytest.raises(InputError, match=f"update 5 at .*: the {what}.* text {text!r} and image {image!r}.* is not finite"):
        trainer.update(iter(source), 4)
    assert torch.equal(weights_of(trainer), before)
    assert trainer.state_is_consistent


def spoil(patch: pytest.MonkeyPatch, trainer: Trainer, what: str, half: AnchorBatch | None = None) -> tuple[str, str]:
    """Make a number of the second half of each update NaN; return the pair of ``half`` that it belongs to."""
    compute_loss, calls = Objective.__call__, itertools.count()
    column = 2 if what == "score" else 0

    def spoilt(self: Objective, model: RetrievalModel, half: AnchorBatch, compute: ComputeSettings) -> LossTerms:
        loss = compute_loss(self, model, half, compute)
        if next(calls) % 4 != 1:
            return loss
        if what == "score":
            hinge = loss.hinge.clone()
            hinge[0, column - 1] = math.nan
            return loss._replace(hinge=hinge)
        if what == "alignment":
            return loss._replace(alignment=loss.alignment * math.nan)
        hinge = loss.hinge.clone()
        hinge.register_hook(lambda gradient: gradient * math.inf)
        return loss._replace(hinge=hinge)

    if half is None:
        patch.setattr(Objective, "__call__", spoilt)
        return "", ""
    kept = trainer.objective(trainer.model, half, trainer.compute).pairs
    patch.setattr(Objective, "__call__", spoilt)
    text, image = kept[0, column].tolist()
    return half.batch.text_ids[text], half.batch.image_names[image]


def test_a_restored_trainer_continues_alike(bundled: Golden, compute: ComputeSettings) -> None:
    source = list(halves(bundled))
    whole = Trainer(bundled.model(), options_of(), compute, SingleProcess())
    for number in range(3):
        whole.update(iter(source), number)
    state = whole.state()
    other = Trainer(RetrievalModel(bundled.config), options_of(), compute, SingleProcess())
    other.restore({part: copy.deepcopy(value) for part, value in state.items()})
    for trainer in (whole, other):
        trainer.update(iter(source), 3)
    assert torch.equal(weights_of(whole), weights_of(other))


def test_dropout_depends_on_seed_rank_and_update_alone(bundled: Golden, compute: ComputeSettings) -> None:
    source = list(halves(bundled))

    def gradient(number: int, **changes: Any) -> Tensor:
        trainer = Trainer(RetrievalModel(bundled.config.with_dropout(0.3)), options_of(**changes), compute, SingleProcess())
        trainer.model.load_state_dict(bundled.model().state_dict())
        torch.rand(3)
        trainer.update(iter(source), number)
        return trainer.gradient.flat

    assert torch.equal(gradient(4), gradient(4))
    assert not torch.equal(gradient(4), gradient(5))
    assert not torch.equal(gradient(4), gradient(4, seed=43))


@pytest.mark.parametrize(("effective", "divide"), [(4, False), (4, True), (None, False)])
def test_effective_batch_keeps_the_weight_of_the_alignment(
    bundled: Golden, compute: ComputeSettings, effective: int | None, divide: bool
) -> None:
    """Twice the recipe's micro-steps in one process: each counts half, so that the ratio to the ranking is as published."""
    options = options_of(effective_batch=effective, iais_divide=divide, iais_schedule="const")
    trainer = Trainer(bundled.model(), options, compute, SingleProcess())
    assert trainer.micro_steps == (effective or 2)
    source = list(halves(bundled))
    with torch.no_grad():
        raw = [trainer.objective(bundled.model(), half, compute) for half in source[: 2 * trainer.micro_steps]]
    terms = trainer.update(iter(source), 0)
    share = (1 if divide else options.train_batch_size) / trainer.micro_steps
    assert terms.alignment.tolist() == pytest.approx([float(loss.alignment[0]) * share for loss in raw], rel=1e-4)
    assert terms.ranking.tolist() == pytest.approx([float(loss.hinge.mean()) / trainer.micro_steps for loss in raw], rel=1e-4)


def test_micro_steps() -> None:
    assert options_of(train_batch_size=8).micro_steps(3) == 8
    assert options_of(effective_batch=64).micro_steps(4) == 16
    with pytest.raises(InputError, match="effective_batch is 64, expected a multiple of the 3 ranks"):
        options_of(effective_batch=64).micro_steps(3)
    with pytest.raises(InputError, match="micro_steps_per_pass is 4, expected a divisor of the 2 micro-steps per update"):
        options_of(effective_batch=64, micro_steps_per_pass=4).micro_steps(32)


def test_layer_numbers() -> None:
    config = UniterConfig()
    assert config.layer_numbers((-1, 0, 11), "iais_layers") == (0, 11)
    assert config.layer_numbers([3, 0, -12, 3], "layers") == (0, 3)
    assert config.layer_numbers(["all", 1], "layers") == tuple(range(12))
    with pytest.raises(InputError, match="iais_layers names layer 12, expected -12 to 11"):
        config.layer_numbers((12,), "iais_layers")

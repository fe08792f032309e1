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
from optim.trainer import Trainer
from tests.conftest import CPU, Golden
from utils.distributed import SingleProcess
from utils.errors import InputError
from utils.precision import Precision

# Half precision with loss scaling; the programs allow it only on CUDA, which test machines lack.
IN_FP16 = ComputeSettings(Precision("fp16", CPU), ChunkSize())


def options_of(**changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "train_txt_dbs": ("t",), "train_img_dbs": ("i",), "val_txt_db": "t", "val_img_db": "i", "output_dir": "o",
        "train_batch_size": 2, "hard_neg_size": 3, "num_train_steps": 10, "warmup_steps": 2, "IAIS": "singular",
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def trainer_of(golden: Golden, compute: ComputeSettings, **changes: Any) -> Trainer:
    return Trainer(golden.model(), options_of(**changes), compute, SingleProcess())


def halves(golden: Golden, micro_steps_per_pass: int = 1) -> Iterator[AnchorBatch]:
    splits = [golden.source()]
    dataset = HardNegativeDataset(splits, negative_size=7, micro_steps=20, micro_steps_per_pass=micro_steps_per_pass)
    return (dataset[number] for number in range(len(dataset)))


def weights_of(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iais_divide": True},
        {"iais_weight": 3.0, "iais_schedule": "const"},
        {"iais_schedule": "linear"},
        {"iais_schedule": "log", "IAIS": "distributed"},
        {"train_batch_size": 4, "micro_steps_per_pass": 2},
        {"effective_batch": 4},  # twice the micro-steps: each alignment counts half, so that its ratio to the ranking stays
        {"effective_batch": 4, "iais_divide": True},
        {"IAIS": None},
        {"mining": "random"},
    ],
    ids=str,
)
def test_loss_is_the_weighted_sum_of_its_terms(bundled: Golden, compute: ComputeSettings, changes: dict[str, Any]) -> None:
    """The gradient is that of the formula, written out here with the objective's raw terms."""
    trainer = trainer_of(bundled, compute, grad_norm=-1.0, **changes)
    options, batches = trainer.options, list(halves(bundled, trainer.options.micro_steps_per_pass))
    terms = trainer.update(iter(batches), 4)

    model = bundled.model()
    weight = options.iais_weight * iais_weight(4, 10, options.iais_schedule)
    weight *= (1 if options.iais_divide else options.train_batch_size) / trainer.micro_steps
    total = torch.zeros(())
    for half in batches[: 2 * trainer.micro_steps // options.micro_steps_per_pass]:
        raw = trainer.objective(model, half, compute)
        total = total + raw.hinge.mean(dim=1).sum() / trainer.micro_steps + weight * raw.alignment.sum()
    total.backward()
    assert trainer.micro_steps == (options.effective_batch or options.train_batch_size)
    assert float(terms.ranking.sum() + terms.alignment.sum()) == pytest.approx(total.item(), rel=1e-5)
    assert len(terms.ranking) == len(terms.alignment) == 2 * trainer.micro_steps
    largest = float(trainer.gradient.flat.abs().max())
    for actual, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamax", "Adamax"), ("adamw", "BertAdamW")])
def test_optimizer_options(bundled: Golden, compute: ComputeSettings, name: str, kind: str) -> None:
    changes = {"optim": name, "betas": (0.8, 0.95), "weight_decay": 0.2, "learning_rate": 0.01, "grad_norm": 0.5}
    trainer = trainer_of(bundled, compute, **changes)
    terms = trainer.update(halves(bundled), 4)
    assert type(trainer.optimizer).__name__ == kind
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.2)
    assert group["lr"] == terms.scalars["lr"] == learning_rate(5, 0.01, 2, 10)
    assert terms.scalars["grad_norm"] > 0.5
    assert float(trainer.gradient.flat.norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("choice", ["alternate", "L", "V"])
def test_modality_and_layers(bundled: Golden, compute: ComputeSettings, choice: str) -> None:
    trainer = trainer_of(bundled, compute, iais_modality=choice, iais_layers=(0, -1))
    for half in itertools.islice(halves(bundled), 2):
        modality: Any = {"image": "V", "text": "L"}[half.anchor] if choice == "alternate" else choice
        positive = half.batch.select(half.batch.pairs[:1])
        with torch.no_grad():
            maps = bundled.model()(positive, compute, MapRequest([0], [0, 2])).maps
            pairs = [PairAttention.of_map(maps[layer][0], int(positive.tokens.lengths[0])) for layer in (0, 2)]
            expected = mean_over_layers(REGULARISERS["singular"], pairs, modality)
            actual = trainer.objective(trainer.model, half, compute).alignment[0]
        assert float(actual) == pytest.approx(float(expected), rel=1e-4)


def test_mining_in_bf16_leaves_the_hard_pass_in_fp32(bundled: Golden, compute: ComputeSettings) -> None:
    half, model, objective = next(halves(bundled)), bundled.model(), Objective(hard_neg_size=3, margin=0.2)
    mixed = replace(compute, mining=Precision("bf16", CPU))
    exact, rough = (objective.mine(model, half, settings) for settings in (compute, mixed))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.1, rtol=0.1)
    losses = []
    for settings in (compute, mixed):
        torch.manual_seed(0)
        losses.append(objective.loss(model, half, settings, exact).hinge)
    assert torch.equal(*losses)


def spoil(patch: pytest.MonkeyPatch, trainer: Trainer, what: str, half: AnchorBatch | None = None) -> tuple[str, str]:
    """Make a number of the second half of each update NaN; return the pair of ``half`` that it belongs to."""
    compute_loss, calls, column = Objective.__call__, itertools.count(), 2 if what == "score" else 0
    pair = [0, 0] if half is None else trainer.objective(trainer.model, half, trainer.compute).pairs[0, column].tolist()

    def spoilt(self: Objective, model: RetrievalModel, half: AnchorBatch, compute: ComputeSettings) -> LossTerms:
        loss = compute_loss(self, model, half, compute)
        if next(calls) % 4 != 1:
            return loss
        if what == "alignment":
            return loss._replace(alignment=loss.alignment * math.nan)
        hinge = loss.hinge.clone()
        if what == "score":
            hinge[0, column - 1] = math.nan
        else:
            hinge.register_hook(lambda gradient: gradient * math.inf)
        return loss._replace(hinge=hinge)

    patch.setattr(Objective, "__call__", spoilt)
    return ("", "") if half is None else (half.batch.text_ids[pair[0]], half.batch.image_names[pair[1]])


@pytest.mark.parametrize("what", ["score", "alignment", "gradient"])
def test_non_finite_numbers_are_named(
    bundled: Golden, compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In fp32 the run ends with the names of text and image, and the weights stay as they were."""
    trainer, batches = trainer_of(bundled, compute), list(halves(bundled))
    before = weights_of(trainer)
    text, image = spoil(monkeypatch, trainer, what, batches[1])
    with pytest.raises(InputError, match=f"update 5 at .*: the {what}.* text {text!r} and image {image!r}.* is not finite"):
        trainer.update(iter(batches), 4)
    assert torch.equal(weights_of(trainer), before)
    assert trainer.state_is_consistent


def test_a_learning_rate_that_is_too_high_is_named(bundled: Golden, compute: ComputeSettings) -> None:
    trainer, batches = trainer_of(bundled, compute, learning_rate=1e30), halves(bundled)
    trainer.update(batches, 1)
    with pytest.raises(InputError, match=r"update 3 at learning rate .*peak 1e\+30.*: the score of text '.*' and image '.*'"):
        trainer.update(batches, 2)


@pytest.mark.parametrize("what", ["score", "alignment", "gradient"])
def test_fp16_skips_non_finite_updates(bundled: Golden, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    trainer, batches = trainer_of(bundled, IN_FP16, num_train_steps=100), halves(bundled)
    trainer.update(batches, 1)
    before, scale = weights_of(trainer), IN_FP16.precision.scaler.get_scale()
    with monkeypatch.context() as patch:
        spoil(patch, trainer, what)
        assert trainer.update(batches, 2).skipped
    assert torch.equal(weights_of(trainer), before)
    assert IN_FP16.precision.scaler.get_scale() == scale / 2
    assert not trainer.update(batches, 3).skipped
    assert not torch.equal(weights_of(trainer), before)


def test_fp16_does_not_skip_forever(bundled: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeSettings(Precision("fp16", CPU), ChunkSize())
    trainer = trainer_of(bundled, compute, num_train_steps=100)
    spoil(monkeypatch, trainer, "score")
    batches = itertools.cycle(list(halves(bundled))[:4])
    with pytest.raises(InputError, match=r"the score of text '\w+' and image '\S+' is not finite"):
        _ = [trainer.update(batches, number) for number in range(60)]
    assert compute.precision.scaler.get_scale() < 2.0**-10


def test_a_restored_trainer_continues_alike(bundled: Golden, compute: ComputeSettings) -> None:
    batches, trainer = list(halves(bundled)), trainer_of(bundled, compute)
    for number in range(3):
        trainer.update(iter(batches), number)
    other = Trainer(RetrievalModel(bundled.config), options_of(), compute, SingleProcess())
    other.restore(copy.deepcopy(trainer.state()))
    for each in (trainer, other):
        each.update(iter(batches), 3)
    assert torch.equal(weights_of(trainer), weights_of(other))


def test_dropout_depends_on_seed_rank_and_update_alone(bundled: Golden, compute: ComputeSettings) -> None:
    batches = list(halves(bundled))

    def gradient(number: int, **changes: Any) -> Tensor:
        trainer = Trainer(RetrievalModel(bundled.config.with_dropout(0.3)), options_of(**changes), compute, SingleProcess())
        trainer.model.load_state_dict(bundled.model().state_dict())
        torch.rand(3)
        trainer.update(iter(batches), number)
        return trainer.gradient.flat

    assert torch.equal(gradient(4), gradient(4))
    assert not torch.equal(gradient(4), gradient(5))
    assert not torch.equal(gradient(4), gradient(4, seed=43))


def test_micro_steps_per_rank() -> None:
    assert options_of(train_batch_size=8).micro_steps(3) == 8
    assert options_of(effective_batch=64).micro_steps(4) == 16
    with pytest.raises(InputError, match="effective_batch is 64, expected a multiple of the 3 ranks"):
        options_of(effective_batch=64).micro_steps(3)
    with pytest.raises(InputError, match=r"micro_steps_per_pass is 4, expected a divisor of 2 \(micro-steps per update"):
        options_of(effective_batch=64, micro_steps_per_pass=4).micro_steps(32)


def test_layer_numbers() -> None:
    config = UniterConfig()
    assert config.layer_numbers((-1, 0, 11), "iais_layers") == (0, 11)
    assert config.layer_numbers(["all", 1], "layers") == tuple(range(12))
    with pytest.raises(InputError, match="iais_layers names layer 12, expected -12 to 11"):
        config.layer_numbers((12,), "iais_layers")

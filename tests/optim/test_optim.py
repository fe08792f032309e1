"""Parameter groups, optimisers and the update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from optim.adamw import BertAdamW
from optim.build import build_optimiser
from optim.schedule import iais_weight, learning_rate
from optim.update import Updater
from tests.conftest import CPU, Golden
from utils.precision import Precision


def test_what_decays(bundled: Golden) -> None:
    model = bundled.model()
    decaying, exempt = build_optimiser(model, "adamw", (0.9, 0.98), 0.01).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    left_out = {names[id(parameter)] for parameter in exempt["params"]}
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert left_out == {name for name in names.values() if name.endswith(".bias") or name.endswith("LayerNorm.weight")}
    assert "uniter.img_embeddings.img_layer_norm.weight" not in left_out


def test_adamw_against_its_equations() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    expected, mean, square = weight.detach().clone(), torch.zeros(5), torch.zeros(5)
    optimiser = BertAdamW([{"params": [weight], "weight_decay": 0.1}], betas=(0.9, 0.98), eps=1e-6)
    for step in range(1, 6):
        gradient = 1e-6 * torch.randn(5, dtype=torch.float64)  # of eps's size, so that its place matters
        weight.grad = gradient.clone()
        optimiser.param_groups[0]["lr"] = 0.01 * step
        optimiser.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
        rate = 0.01 * step * math.sqrt(1 - 0.98**step) / (1 - 0.9**step)
        expected = expected * (1 - 0.01 * step * 0.1) - rate * mean / (square.sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw"])
@pytest.mark.parametrize("limit", [0.5, -1.0])
def test_update_clips_and_steps(name: str, limit: float) -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    updater = Updater(layer, build_optimiser(layer, name, (0.9, 0.98), 0.0), lambda u: 0.1 * u, limit, Precision("fp32", CPU))  # type: ignore[arg-type]
    for _ in range(2):  # gradients accumulate
        updater.backward(layer(torch.full((1, 3), 2.0)).sum())
    gradients = []
    original = updater.optimiser.step
    updater.optimiser.step = lambda *a: (gradients.append(layer.weight.grad.norm().item()), original(*a))[1]  # type: ignore[method-assign,union-attr]
    assert updater.step(0) == pytest.approx(4 * math.sqrt(3))
    assert gradients[0] == pytest.approx(0.5 if limit > 0 else 4 * math.sqrt(3), rel=1e-4)
    torch.testing.assert_close(layer.weight.detach(), before - 0.1, rtol=1e-3, atol=1e-3)
    assert layer.weight.grad is None


def test_schedules_at_their_ends() -> None:
    assert [learning_rate(u, 1.0, 10, 100) for u in (1, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 1e-8])
    assert learning_rate(1, 1.0, 0, 100) == pytest.approx(0.99)
    assert iais_weight(0, 10, "exp") == pytest.approx(math.exp(-5))
    assert iais_weight(10, 10, "exp") == 1
    assert (iais_weight(0, 10, "linear"), iais_weight(5, 10, "linear")) == (0, 0.5)
    assert iais_weight(0, 10, "log") == 0
    assert iais_weight(3, 10, "const") == 1

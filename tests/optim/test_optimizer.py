"""Parameter groups, AdamW against its equations, and the schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from optim.optimizer import BertAdamW, build_optimizer, iais_weight, learning_rate
from tests.conftest import Golden


def test_what_decays(bundled: Golden) -> None:
    model = bundled.model()
    decaying, exempt = build_optimizer(model, "adamw", (0.9, 0.98), 0.01).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    left_out = {names[id(parameter)] for parameter in exempt["params"]}
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert left_out == {name for name in names.values() if name.endswith(".bias") or name.endswith("LayerNorm.weight")}
    assert "uniter.img_embeddings.img_layer_norm.weight" not in left_out


def test_adamw_against_its_equations() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    expected, mean, square = weight.detach().clone(), torch.zeros(5), torch.zeros(5)
    optimizer = BertAdamW([{"params": [weight], "weight_decay": 0.1}], betas=(0.9, 0.98), eps=1e-6)
    for step in range(1, 6):
        gradient = 1e-6 * torch.randn(5, dtype=torch.float64)  # of eps's size, so that its place matters
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.01 * step
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
        rate = 0.01 * step * math.sqrt(1 - 0.98**step) / (1 - 0.9**step)
        expected = expected * (1 - 0.01 * step * 0.1) - rate * mean / (square.sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_schedules_at_their_ends() -> None:
    assert [learning_rate(u, 1.0, 10, 100) for u in (1, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 1e-8])
    assert learning_rate(1, 1.0, 0, 100) == pytest.approx(0.99)
    assert iais_weight(0, 10, "exp") == pytest.approx(math.exp(-5))
    assert iais_weight(10, 10, "exp") == 1
    assert (iais_weight(0, 10, "linear"), iais_weight(5, 10, "linear")) == (0, 0.5)
    assert iais_weight(0, 10, "log") == 0
    assert iais_weight(3, 10, "const") == 1

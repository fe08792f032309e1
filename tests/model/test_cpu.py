"""Packed weights give the same products, only where they are meant to, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model.linear import Linear, _can_pack, packed_weights
from torch import nn

from data.loader import Loader
from evaluation.scoring import score_matrix
from model.retrieval import ComputeSettings
from tests.conftest import CPU, Golden
from utils.distributed import SingleProcess
from utils.precision import Precision

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Linear:
    monkeypatch.setattr("model.linear.FEWEST_WEIGHTS", 1)
    torch.manual_seed(0)
    return Linear(48, 80)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 5, 48), (0, 48)])
def test_products_are_those_of_the_plain_weights(layer: Linear, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not _can_pack(dtype):
        pytest.skip(f"this torch on this CPU has no packed products of {dtype}")
    rows = torch.randn(shape)
    with torch.no_grad(), packed_weights(layer, dtype):
        assert layer.packed is not None
        product, active = layer(rows), layer(rows, gelu=True)
    expected = F.linear(rows, layer.weight, layer.bias)
    assert product.dtype == dtype
    torch.testing.assert_close(product.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(active.float(), F.gelu(expected), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_gradients_go_to_the_weights_themselves(layer: Linear) -> None:
    rows = torch.randn(4, 48)
    with packed_weights(layer, torch.bfloat16):
        product = layer(rows)
        product.sum().backward()
    assert torch.equal(product, F.linear(rows, layer.weight, layer.bias))
    assert layer.weight.grad is not None


def test_weights_that_changed_are_packed_anew(layer: Linear) -> None:
    rows = torch.randn(4, 48)
    with torch.no_grad(), packed_weights(layer, torch.float32):
        before = layer(rows)
    nn.init.zeros_(layer.weight)
    with torch.no_grad(), packed_weights(layer, torch.float32):
        after = layer(rows)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, layer.bias.expand(4, -1))


def test_nothing_is_left_after_an_error(layer: Linear) -> None:
    with pytest.raises(ValueError, match="inside"), packed_weights(layer, torch.float32):
        raise ValueError("inside")
    assert layer.packed is None
    assert sorted(layer.state_dict()) == ["bias", "weight"]


def test_packing_draws_no_random_numbers(layer: Linear) -> None:
    """Dropout would change from the first half of a run to the others, and a resumed run with it."""
    _can_pack.cache_clear()
    before = torch.get_rng_state()
    with packed_weights(layer, torch.float32):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_where_torch_cannot_pack_nothing_changes(layer: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.linear._can_pack", lambda dtype: False)
    rows = torch.randn(4, 48)
    with torch.no_grad(), packed_weights(layer, torch.float32):
        assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))


def test_small_layers_are_left_as_they_are() -> None:
    layer = Linear(48, 80)
    with packed_weights(layer, torch.float32):
        assert layer.packed is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_evaluation_with_packed_weights(
    bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The golden model is too small to be packed by itself; its scores are the same if it is."""
    compute = replace(compute, precision=Precision(precision, CPU))  # type: ignore[arg-type]
    source, model = bundled.source(), bundled.model()
    plain = score_matrix(model, source, compute, loader, SingleProcess()).scores
    monkeypatch.setattr("model.linear.FEWEST_WEIGHTS", 1)
    packed = score_matrix(model, source, compute, loader, SingleProcess()).scores
    tolerance = 1e-5 if precision == "fp32" else 0.05
    np.testing.assert_allclose(packed, plain, atol=tolerance, rtol=tolerance)

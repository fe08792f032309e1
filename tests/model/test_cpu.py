"""What makes a CPU faster changes no score and no gradient, keeps less memory, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from data.loader import Loader
from evaluation.scoring import score_matrix
from model.cpu import PrepackedLinear, can_prepack, packed_for_inference, recompute_in_backward
from model.layers import Intermediate
from model.retrieval import ComputeSettings, RetrievalModel
from tests.conftest import CPU, Golden
from tests.model.test_twin import ALL, CONFIG, random_batch
from utils.distributed import SingleProcess
from utils.precision import Precision

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def intermediate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Intermediate]:
    """A linear layer and GELU, packed although they are small; nothing is left on them after the test."""
    monkeypatch.setattr("model.cpu.MIN_WEIGHTS", 1)
    torch.manual_seed(0)
    module = Intermediate(CONFIG)
    yield module
    assert "forward" not in vars(module) | vars(module.dense)
    assert sorted(module.state_dict()) == ["dense.bias", "dense.weight"]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (0, 24)])
def test_products_are_those_of_the_plain_weights(
    intermediate: Intermediate, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if not can_prepack(dtype):
        pytest.skip(f"this torch on this CPU has no prepacked products of {dtype}")
    rows = torch.randn(shape)
    with torch.no_grad(), packed_for_inference(intermediate, dtype), packed_for_inference(intermediate.dense, dtype):
        active, product = intermediate(rows), intermediate.dense(rows)
    expected = F.linear(rows, intermediate.dense.weight, intermediate.dense.bias)
    assert product.dtype == dtype
    torch.testing.assert_close(product.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(active.float(), F.gelu(expected), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_changed_weights_are_packed_again(intermediate: Intermediate) -> None:
    rows = torch.randn(4, 24)
    for _ in range(2):
        with torch.no_grad(), packed_for_inference(intermediate, torch.float32):
            assert isinstance(vars(intermediate)["forward"], PrepackedLinear)
            packed = intermediate(rows)
        torch.testing.assert_close(packed, intermediate(rows))
        nn.init.zeros_(intermediate.dense.weight)


def test_packing_draws_no_random_numbers(intermediate: Intermediate) -> None:
    """It would change dropout from the first half of a run to the others, and a resumed run with it. Also after an error."""
    can_prepack.cache_clear()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"), packed_for_inference(intermediate, torch.float32):
        raise ValueError("inside")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reason", ["not supported", "too small"])
def test_no_op(intermediate: Intermediate, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "too small":
        monkeypatch.setattr("model.cpu.MIN_WEIGHTS", intermediate.dense.weight.numel() + 1)
    else:
        monkeypatch.setattr("model.cpu.can_prepack", lambda dtype: False)
    with torch.no_grad(), packed_for_inference(intermediate, torch.float32):
        assert "forward" not in vars(intermediate)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_with_packed_weights(
    bundled: Golden, compute: ComputeSettings, loader: Loader, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The golden model is too small to be packed by itself; its scores are the same if it is."""
    compute = replace(compute, precision=Precision(precision, CPU), prepare=packed_for_inference)  # type: ignore[arg-type]
    split, model = bundled.source(), bundled.model()
    plain = score_matrix(model, split, compute, loader, SingleProcess()).scores
    monkeypatch.setattr("model.cpu.MIN_WEIGHTS", 1)
    packed = score_matrix(model, split, compute, loader, SingleProcess()).scores
    assert not np.array_equal(packed, plain) or not can_prepack(compute.precision.dtype)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    np.testing.assert_allclose(packed, plain, atol=tolerance, rtol=tolerance)


def gradient(compute: ComputeSettings, *, recompute: bool = False) -> tuple[Tensor, int]:
    """The gradient of all weights, with dropout, and how many bytes the forward pass kept for it."""
    torch.manual_seed(1)
    model = RetrievalModel(CONFIG.with_dropout(0.3)).train()
    if recompute:
        recompute_in_backward(model)
    batch = random_batch(7, ALL)
    torch.manual_seed(2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        scores = model(batch, compute).scores
    scores.square().sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(gradients), sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_gradient(compute: ComputeSettings, precision: str) -> None:
    compute = replace(compute, precision=Precision(precision, CPU))  # type: ignore[arg-type]
    plain, kept = gradient(compute)
    recomputing, kept_recomputing = gradient(compute, recompute=True)
    checkpointing, kept_checkpointing = gradient(replace(compute, checkpointing=True))
    assert torch.equal(recomputing, plain)
    assert torch.equal(checkpointing, plain)
    assert kept_recomputing < 0.35 * kept
    assert kept_checkpointing < 0.25 * kept_recomputing

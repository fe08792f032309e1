"""What is not kept for the backward pass is computed again there, dropout included, and changes no gradient."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.layers import Block
from model.memory import forgotten
from model.retrieval import ComputeSettings, RetrievalModel
from tests.model.test_twin import ALL, CONFIG, random_batch
from utils.precision import Precision


def gradient(compute: ComputeSettings) -> tuple[Tensor, int]:
    """The gradient of all weights, with dropout, and how many bytes the forward pass left allocated for its computation."""
    torch.manual_seed(1)
    model = RetrievalModel(CONFIG.with_dropout(0.3)).train()
    batch = random_batch(7, ALL)
    torch.manual_seed(2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        scores = model(batch, compute).scores
    scores.square().sum().backward()
    size = sum(event.self_cpu_memory_usage for event in profiler.key_averages())  # what was freed again counts as negative
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]), size


@pytest.mark.parametrize("forget", [True, False])
def test_what_is_forgotten_is_not_kept(forget: bool) -> None:
    wide, weight = torch.randn(2, 50, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        active = F.gelu(wide)
        with forgotten(active, partial(F.gelu, wide.detach())) if forget else nullcontext():
            narrow = F.linear(active, weight)
        size = active.nbytes
        del active
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert kept == narrow.nbytes + (0 if forget else size)
    narrow.sum().backward()
    torch.testing.assert_close(weight.grad, F.gelu(wide.detach()).sum((0, 1)).expand(16, 64))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_repeating_operations_changes_no_gradient(
    compute: ComputeSettings, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    compute = replace(compute, precision=Precision(precision, torch.device("cpu")))  # type: ignore[arg-type]
    lean, kept_by_lean = gradient(compute)
    whole_layers, kept_by_whole_layers = gradient(replace(compute, checkpointing=True))
    forward = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, hidden, mask, *, cls_only, recompute: forward(self, hidden, mask, cls_only=cls_only)
    )
    plain, kept_by_plain = gradient(compute)
    torch.testing.assert_close(lean, plain, atol=0, rtol=0)
    torch.testing.assert_close(whole_layers, plain, atol=0, rtol=0)
    assert kept_by_lean < 0.35 * kept_by_plain
    assert kept_by_whole_layers < 0.25 * kept_by_lean

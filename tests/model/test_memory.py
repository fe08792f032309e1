"""What is not kept for the backward pass is computed again there, dropout included, and changes no gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.layers import Block
from model.retrieval import Compute, RetrievalModel
from tests.model.test_twin import ALL, CONFIG, random_batch
from utils.precision import Precision


def gradient(compute: Compute) -> tuple[Tensor, int]:
    """The gradient of all weights, with dropout, and how many bytes were kept for its computation."""
    torch.manual_seed(1)
    model = RetrievalModel(CONFIG.with_dropout(0.3)).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(random_batch(7, ALL), compute).scores
    scores.square().sum().backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]), size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_repeating_operations_changes_no_gradient(compute: Compute, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    compute = replace(compute, precision=Precision(precision, torch.device("cpu")))  # type: ignore[arg-type]
    lean, kept_by_lean = gradient(compute)
    whole_layers, kept_by_whole_layers = gradient(replace(compute, checkpointing=True))
    forward = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, hidden, mask, *, cls_only, again: forward(self, hidden, mask, cls_only=cls_only)
    )
    plain, kept_by_plain = gradient(compute)
    torch.testing.assert_close(lean, plain, atol=0, rtol=0)
    torch.testing.assert_close(whole_layers, plain, atol=0, rtol=0)
    assert kept_by_lean < 0.75 * kept_by_plain
    assert kept_by_whole_layers < 0.3 * kept_by_plain

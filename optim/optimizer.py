"""The optimizer: learning-rate and λ schedules, parameter groups, AdamW as published, and the flat gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn


def learning_rate(update: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then linear decay to 0 with a floor of 1e-8; ``update`` counts from 1."""
    factor = update / warmup if update < warmup else (total - update) / (total - warmup)
    return max(peak * factor, 1e-8)


def iais_weight(update: int, total: int, schedule: Literal["exp", "linear", "log", "const"]) -> float:
    """λ_t of update t of T (Ren et al. 2021, section 3, and its ablations); ``update`` counts from 0."""
    progress = update / total
    if schedule == "exp":
        return math.exp(5 * (progress - 1))
    if schedule == "log":
        return 1 - math.exp(-5 * progress)
    return progress if schedule == "linear" else 1.0


def build_optimizer(
    model: nn.Module, name: Literal["adam", "adamax", "adamw"], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of the published runs; its learning rate is set before each step.

    Biases and parameters named ``LayerNorm.weight`` do not decay; ``img_layer_norm`` and ``pos_layer_norm`` do, as published.
    """
    decaying: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        is_exempt = parameter_name.endswith("bias") or "LayerNorm.weight" in parameter_name
        (exempt if is_exempt else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    if name == "adam":
        return torch.optim.Adam(groups, lr=0.0, betas=betas)
    if name == "adamax":
        return torch.optim.Adamax(groups, lr=0.0, betas=betas)
    return BertAdamW(groups, betas=betas, eps=1e-6)


class BertAdamW(torch.optim.AdamW):
    """AdamW that adds eps before the bias correction: the step is lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + eps).

    torch's AdamW corrects v first, which shrinks its eps by √(1 - β₂ᵗ), 0.14 at the first update. Over the five updates of the
    golden run that moves the weights by 2e-3 and the gradient norm by 3e-2. Here torch's fused or for-each step runs with the
    eps that makes the two equal.
    """

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=0.0, betas=betas, eps=eps)
        self.uncorrected_eps = eps

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the learning rates of the parameter groups."""
        for group in self.param_groups:
            steps = next((float(self.state[p]["step"]) for p in group["params"] if p in self.state), 0.0)
            group["eps"] = self.uncorrected_eps / math.sqrt(1 - group["betas"][1] ** (steps + 1))
        return super().step(closure)


class FlatGradient:
    """All gradients as views of one tensor, ``flat``, so that averaging them over ranks is one message and no copy."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in wanted), dtype=wanted[0].dtype, device=wanted[0].device)
        for parameter, part in zip(wanted, self.flat.split([p.numel() for p in wanted]), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        """Start an update."""
        self.flat.zero_()

    def finite_mark(self) -> Tensor:
        """A number () that is finite only while every gradient is; reading it, which waits for a GPU, can be postponed."""
        return self.flat.sum()

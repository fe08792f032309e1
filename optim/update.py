"""One update: gradients accumulate over backward passes, are clipped, and the optimiser steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.precision import Precision


class Updater:
    """Accumulates gradients and applies them.

    Args:
        learning_rate: of update u, counted from 1.
        grad_norm: the norm to clip to, or -1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        grad_norm: float,
        precision: Precision,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = optimiser
        self.learning_rate = learning_rate
        self.max_norm = grad_norm if grad_norm > 0 else float("inf")
        self.precision = precision

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar ``loss``."""
        self.precision.scaler.scale(loss).backward()

    def step(self, update: int) -> float:
        """Apply the gradients as update ``update``, counted from 0; returns their norm before clipping."""
        rate = self.learning_rate(update + 1)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.precision.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.precision.scaler.step(self.optimiser)
        self.precision.scaler.update()
        self.optimiser.zero_grad()
        return float(norm)

"""All gradients of a model in one piece of memory, so that averaging them over workers is one message and no copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Gradient:
    """Gives each parameter a ``grad`` that is a part of ``flat``, in which autograd accumulates."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in wanted), dtype=wanted[0].dtype, device=wanted[0].device)
        for parameter, part in zip(wanted, self.flat.split([p.numel() for p in wanted]), strict=True):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        """Start an update."""
        self.flat.zero_()

    def mark(self) -> Tensor:
        """A number () that is finite only while every gradient is; reading it can wait."""
        return self.flat.sum()

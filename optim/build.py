"""Parameter groups and the optimiser."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from optim.adamw import BertAdamW


def build_optimiser(
    model: nn.Module, name: Literal["adam", "adamax", "adamw"], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of the published runs; its learning rate is set before each step.

    Biases and parameters named ``LayerNorm.weight`` do not decay; ``img_layer_norm`` and ``pos_layer_norm`` do, as published.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not _exempt(n)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if _exempt(n)], "weight_decay": 0.0},
    ]
    if name == "adam":
        return torch.optim.Adam(groups, lr=0.0, betas=betas)
    if name == "adamax":
        return torch.optim.Adamax(groups, lr=0.0, betas=betas)
    return BertAdamW(groups, betas=betas, eps=1e-6)


def _exempt(name: str) -> bool:
    return name.endswith("bias") or "LayerNorm.weight" in name

"""Learning rate and λ_t as functions of the update's number."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(update: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then linear decay to 0 with a floor of 1e-8; ``update`` counts from 1."""
    factor = update / warmup if update < warmup else (total - update) / (total - warmup)
    return max(peak * factor, 1e-8)


def iais_weight(update: int, total: int, schedule: Literal["exp", "linear", "log", "const"]) -> float:
    """λ_t of update t of T (Ren et al. 2021, section 3.4 and its ablations); ``update`` counts from 0."""
    progress = update / total
    if schedule == "exp":
        return math.exp(5 * (progress - 1))
    if schedule == "log":
        return 1 - math.exp(-5 * progress)
    return progress if schedule == "linear" else 1.0

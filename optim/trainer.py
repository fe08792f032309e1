"""One update of training: the losses of its halves, their weights, the gradient, the step; what options say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Half
from model.objective import Objective
from model.retrieval import Compute, RetrievalModel
from optim.build import build_optimiser
from optim.schedule import iais_weight, learning_rate
from utils.errors import InputError
from utils.run_options import TrainOptions


class UpdateTerms(NamedTuple):
    """What one update was made of; one entry for each half of each micro-step, in the order of the halves.

    Attributes:
        ranking: mean hinge of a half, divided by ``train_batch_size`` as it enters the loss.
        alignment: alignment term of a half, weighted as it enters the loss.
        weight: λ_t times ``iais_weight``.
        learning_rate: that of this step.
        grad_norm: of all gradients, before clipping.
    """

    ranking: Tensor
    alignment: Tensor
    weight: float
    learning_rate: float
    grad_norm: float


class Trainer:
    """A model, its objective and its optimiser, as ``options`` describe them.

    Raises:
        InputError: ``iais_layers`` names a layer that the encoder does not have.
    """

    def __init__(self, model: RetrievalModel, options: TrainOptions, compute: Compute) -> None:
        self.model = model
        self.options = options
        self.compute = compute
        self.objective = Objective(
            hard_neg_size=options.hard_neg_size,
            margin=options.margin,
            mining=options.mining,
            regulariser=options.IAIS,
            layers=layer_numbers(options.iais_layers, model.config.num_hidden_layers),
            modality=options.iais_modality,
        )
        self.optimiser = build_optimiser(model, options.optim, options.betas, options.weight_decay)

    def update(self, halves: Iterator[Half], number: int) -> UpdateTerms:
        """Take the halves of one update from ``halves`` and apply their gradient as update ``number``, counted from 0.

        Raises:
            InputError: outside fp16, where such steps are skipped, a gradient that is not finite.
        """
        options, scaler = self.options, self.compute.precision.scaler
        rate = learning_rate(number + 1, options.learning_rate, options.warmup_steps, options.num_train_steps)
        weight = options.iais_weight * iais_weight(number, options.num_train_steps, options.iais_schedule)
        divisor = options.train_batch_size if options.iais_divide else 1
        ranking, alignment = [], []
        for _ in range(2 * options.train_batch_size // options.micro_steps_per_pass):
            terms = self.objective(self.model, next(halves), self.compute)
            ranking.append(terms.hinge.mean(dim=1) / options.train_batch_size)
            alignment.append(weight * terms.alignment / divisor)
            scaler.scale(ranking[-1].sum() + alignment[-1].sum()).backward()

        scaler.unscale_(self.optimiser)
        limit = options.grad_norm if options.grad_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not (math.isfinite(norm) or scaler.is_enabled()):
            raise InputError(
                f"update {number + 1}: the gradient's norm is {norm} at learning rate {rate:g}, "
                f"expected a finite one: is learning_rate {options.learning_rate:g} too high?"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        scaler.step(self.optimiser)
        scaler.update()
        self.optimiser.zero_grad()
        return UpdateTerms(torch.cat(ranking).detach(), torch.cat(alignment).detach(), weight, rate, norm)


def layer_numbers(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Layers counted from the first (0 …) or from the last (-1 …) as numbers from the first.

    Raises:
        InputError: one that an encoder of ``count`` layers does not have.
    """
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(
                f"iais_layers names layer {layer}, expected -{count} to {count - 1}: the encoder has {count} layers"
            )
    return tuple(sorted({layer % count for layer in layers}))

"""One update of training: the losses of its halves, their weights, the gradient, the step; what options say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import AnchorBatch
from model.cpu import recompute_in_backward
from model.objective import LossTerms, Objective
from model.retrieval import ComputeSettings, RetrievalModel
from optim.optimizer import FlatGradient, build_optimizer, iais_weight, learning_rate
from optim.options import TrainOptions
from utils.distributed import ProcessGroup
from utils.errors import InputError

# fp16 skips an update whose gradient overflows and halves the scale. What still overflows at this scale is no overflow.
SMALLEST_SCALE = 2.0**-10


class UpdateTerms(NamedTuple):
    """What one update was made of; one entry for each half of each micro-step, in the order of the halves.

    Attributes:
        ranking: mean hinge of a half, divided by the micro-steps as it enters the loss; mean over workers.
        alignment: alignment term of a half, weighted as it enters the loss; mean over workers.
        weight: λ_t times ``iais_weight``.
        learning_rate: that of this step.
        grad_norm: of the gradient averaged over workers, before clipping.
        skipped: whether fp16 scaling left out the step, because the gradient was not finite.
    """

    ranking: Tensor
    alignment: Tensor
    weight: float
    learning_rate: float
    grad_norm: float
    skipped: bool


class Trainer:
    """A model, its objective and its optimiser, as ``options`` describe them, the same on every worker.

    Attributes:
        micro_steps: of one update on this worker.
        state_is_consistent: whether the state is whole, also after an exception: false when one came in the midst of a step.

    Raises:
        InputError: ``iais_layers`` names a layer that the encoder does not have; ``effective_batch`` does not fit the workers.
    """

    def __init__(self, model: RetrievalModel, options: TrainOptions, compute: ComputeSettings, group: ProcessGroup) -> None:
        self.model = model
        self.options = options
        self.compute = compute
        self.group = group
        self.micro_steps = options.micro_steps(self.group.world_size)
        self.objective = Objective(
            hard_neg_size=options.hard_neg_size,
            margin=options.margin,
            mining=options.mining,
            regulariser=options.IAIS,
            layers=model.config.layer_numbers(options.iais_layers, "iais_layers"),
            modality=options.iais_modality,
        )
        self.optimiser = build_optimizer(model, options.optim, options.betas, options.weight_decay)
        self.gradient = FlatGradient(model.parameters())
        if not compute.checkpointing:
            recompute_in_backward(model)
        self.state_is_consistent = True

    def update(self, halves: Iterator[AnchorBatch], number: int) -> UpdateTerms:
        """Take the halves of one update from ``halves`` and apply their gradient as update ``number``, counted from 0.

        Dropout is drawn from (seed, worker, number). The gradient is averaged over the workers, so that N workers of A
        micro-steps give the update of one of N·A.

        Raises:
            InputError: a loss or gradient that is not finite; the message names the texts and images. Under fp16 such a step is
                skipped, and this is raised only when that does not help.
            RankLost: before the step, so that the model is still that of the last update.
        """
        options, scaler = self.options, self.compute.precision.scaler
        rate = learning_rate(number + 1, options.learning_rate, options.warmup_steps, options.num_train_steps)
        weight = options.iais_weight * iais_weight(number, options.num_train_steps, options.iais_schedule)
        # As published: the sum over train_batch_size micro-steps is not divided, whatever share of them this worker has.
        divisor = self.micro_steps if options.iais_divide else self.micro_steps / options.train_batch_size
        torch.manual_seed(int(np.random.SeedSequence([options.seed, self.group.rank, number]).generate_state(1, np.uint64)[0]))
        self.gradient.zero()
        ranking, alignment, traces = [], [], []
        for _ in range(2 * self.micro_steps // options.micro_steps_per_pass):
            half = next(halves)
            loss = self.objective(self.model, half, self.compute)
            ranking.append(loss.hinge.mean(dim=1) / self.micro_steps)
            alignment.append(weight * loss.alignment / divisor)
            scaler.scale(ranking[-1].sum() + alignment[-1].sum()).backward()
            traces.append(_Trace.of(half, loss, self.gradient))

        # On the CPU and first: there a worker that has gone is noticed, while NCCL would wait for it on the GPU.
        terms = torch.stack([torch.cat(ranking).detach(), torch.cat(alignment).detach()]).cpu()
        self.group.average(terms)
        self.group.average(self.gradient.flat)
        scaler.unscale_(self.optimiser)
        limit = options.grad_norm if options.grad_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # Both: the hinge's clamp stops a NaN on its way back to the gradient.
        finite = math.isfinite(norm) and bool(terms.isfinite().all())
        if not finite and (not scaler.is_enabled() or scaler.get_scale() < SMALLEST_SCALE):
            self._refuse(traces, f"update {number + 1} at learning rate {rate:g} (peak {options.learning_rate:g})", norm)
        self.state_is_consistent = False
        if finite:
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            scaler.step(self.optimiser)
            scaler.update()
        else:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        self.state_is_consistent = True
        return UpdateTerms(terms[0], terms[1], weight, rate, norm, skipped=not finite)

    def state(self) -> dict[str, Any]:
        """What the next update depends on beside options and data: names to tensors, numbers and lists."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.compute.precision.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned in a run with the same options."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.compute.precision.scaler.load_state_dict(state["scaler"])

    def _refuse(self, traces: list[_Trace], when: str, norm: float) -> None:
        with self.group.raise_on_all_ranks():
            named = next((named for trace in traces if (named := trace.first_non_finite())), None)
            if named:
                raise InputError(f"{when}: {named}")
        with self.group.raise_on_all_ranks():
            raise InputError(f"{when}: the gradient's norm is {norm}, expected a finite one")


class _Trace(NamedTuple):
    """What remains of a half to tell by which of its pairs a number that is not finite came in."""

    half: str
    text_ids: tuple[str, ...]
    image_names: tuple[str, ...]
    pairs: Tensor  # (G, 1 + H, 2) on the CPU, indices into the names, the positive first
    hinge: Tensor  # (G, H)
    alignment: Tensor  # (G,)
    gradient: Tensor  # (), finite while the gradient accumulated so far is

    @classmethod
    def of(cls, half: AnchorBatch, loss: LossTerms, gradient: FlatGradient) -> _Trace:
        names = half.batch.text_ids, half.batch.image_names
        return cls(half.anchor, *names, loss.pairs, loss.hinge.detach(), loss.alignment.detach(), gradient.finite_mark())

    def first_non_finite(self) -> str | None:
        """The first thing of this half that is not finite, and where; None when all of it is finite."""
        for group, pairs in enumerate(self.pairs):
            bad = self.hinge[group].isfinite().logical_not().cpu()
            if bool(bad.any()):
                pair = pairs[0] if bool(bad.all()) else pairs[1 + int(bad.nonzero()[0])]
                return f"the score of {self._named(pair)} is not finite"
            if not bool(self.alignment[group].isfinite()):
                return f"the alignment loss of {self._named(pairs[0])} is not finite"
        if not bool(self.gradient.isfinite()):
            positives = ", ".join(self._named(pairs[0]) for pairs in self.pairs[:8])
            return f"the gradient of the {self.half}-anchored half of {positives} is not finite, its loss is"
        return None

    def _named(self, pair: Tensor) -> str:
        text, image = pair.tolist()
        return f"text {self.text_ids[text]!r} and image {self.image_names[image]!r}"

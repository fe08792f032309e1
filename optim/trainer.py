"""One update of training: the losses of its halves, their weights, the gradient, and the optimizer step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import AnchorBatch
from model.iais import REGULARISERS
from model.objective import LossTerms, Objective
from model.retrieval import ComputeSettings, RetrievalModel
from optim.optimizer import FlatGradient, build_optimizer, iais_weight, learning_rate
from optim.options import TrainOptions
from utils.distributed import ProcessGroup
from utils.errors import InputError

LOGGER = logging.getLogger(__name__)
# Under fp16 an update whose gradient overflows is skipped and the scale halved. A gradient that is still
# infinite at this scale did not overflow.
SMALLEST_SCALE = 2.0**-10


class UpdateTerms(NamedTuple):
    """Loss terms and scalars of one update. Tensors have one entry per half of each micro-step; means over ranks.

    Attributes:
        ranking: mean hinge of a half, divided by the micro-steps as it enters the loss.
        alignment: alignment term of a half, weighted as it enters the loss.
        scalars: for the log: mean hinge ``rank``, mean weighted alignment ``iais`` and its weight ``lambda`` (with a
            regulariser), learning rate ``lr``, norm ``grad_norm`` of the gradient before clipping, and examples per second.
        skipped: whether fp16 scaling skipped the step, because the gradient was not finite.
    """

    ranking: Tensor
    alignment: Tensor
    scalars: dict[str, float]
    skipped: bool


class Trainer:
    """A model, its objective and its optimizer, the same on every rank.

    Attributes:
        micro_steps: of one update on this rank.
        state_is_consistent: whether ``state()`` can be saved; false after an exception in the middle of a step.

    Raises:
        InputError: ``iais_layers`` names a layer that the encoder does not have, ``effective_batch`` is not a multiple of
            the number of ranks, or the regulariser does not return a loss.
    """

    def __init__(self, model: RetrievalModel, options: TrainOptions, compute: ComputeSettings, group: ProcessGroup) -> None:
        self.model, self.options, self.compute, self.group = model, options, compute, group
        self.micro_steps = options.micro_steps(group.world_size)
        self.objective = Objective(
            hard_neg_size=options.hard_neg_size,
            margin=options.margin,
            mining=options.mining,
            regulariser=options.IAIS,
            layers=model.config.layer_numbers(options.iais_layers, "iais_layers"),
            modality=options.iais_modality,
        )
        if options.IAIS:  # the first update comes after minutes
            REGULARISERS[options.IAIS].check(model.config.num_attention_heads)
        self.optimizer = build_optimizer(model, options.optim, options.betas, options.weight_decay)
        self.gradient = FlatGradient(model.parameters())
        self.state_is_consistent = True

    def update(self, batches: Iterator[AnchorBatch], number: int) -> UpdateTerms:
        """Take the halves of one update from ``batches`` and apply their gradient as update ``number``, counted from 0.

        Dropout is drawn from (seed, rank, number). The gradient is averaged over the ranks, so that N ranks of A micro-steps
        give the update of one rank of N · A.

        Raises:
            InputError: a loss or gradient is not finite; the message names the texts and images. Under fp16 such a step is
                skipped, and this is raised only if that does not help.
            RankLost: before the step, so that the model is still that of the last update.
        """
        started = time.perf_counter()
        options, scaler = self.options, self.compute.precision.scaler
        rate = learning_rate(number + 1, options.learning_rate, options.warmup_steps, options.num_train_steps)
        weight = options.iais_weight * iais_weight(number, options.num_train_steps, options.iais_schedule)
        # As published, the alignment is summed over train_batch_size micro-steps, the ranking averaged.
        alignment_divisor = self.micro_steps if options.iais_divide else self.micro_steps / options.train_batch_size
        seeds = np.random.SeedSequence([options.seed, self.group.rank, number]).generate_state(1, np.uint64)
        torch.manual_seed(int(seeds[0]))

        self.gradient.zero()
        ranking, alignment, traces = [], [], []
        for _ in range(2 * self.micro_steps // options.micro_steps_per_pass):
            anchors = next(batches)
            loss = self.objective(self.model, anchors, self.compute)
            ranking.append(loss.hinge.mean(dim=1) / self.micro_steps)
            alignment.append(weight * loss.alignment / alignment_divisor)
            scaler.scale(ranking[-1].sum() + alignment[-1].sum()).backward()
            traces.append(_Trace.of(anchors, loss, self.gradient))

        # On the CPU and first: there a lost rank is noticed, whereas NCCL would wait for it on the GPU.
        terms = torch.stack([torch.cat(ranking).detach(), torch.cat(alignment).detach()]).cpu()
        self.group.average(terms)
        self.group.average(self.gradient.flat)
        scaler.unscale_(self.optimizer)
        limit = options.grad_norm if options.grad_norm > 0 else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # Both, because the clamp of the hinge stops a NaN on its way back to the gradient.
        finite = math.isfinite(norm) and bool(terms.isfinite().all())
        if not finite and (not scaler.is_enabled() or scaler.get_scale() < SMALLEST_SCALE):
            self._raise_non_finite(
                traces, f"update {number + 1} at learning rate {rate:g} (peak {options.learning_rate:g})", norm
            )

        self.state_is_consistent = False
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            scaler.step(self.optimizer)
            scaler.update()
        else:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            LOGGER.warning(
                "update %d skipped: its gradient is not finite; the loss scale is now %g", number + 1, scaler.get_scale()
            )
        self.state_is_consistent = True
        scalars = {"rank": float(terms[0].mean()) * self.micro_steps}
        if options.IAIS:
            scalars |= {"iais": float(terms[1].mean()), "lambda": weight}
        examples = 2 * self.micro_steps * self.group.world_size
        scalars |= {"lr": rate, "grad_norm": norm, "ex/s": examples / (time.perf_counter() - started)}
        return UpdateTerms(terms[0], terms[1], scalars, skipped=not finite)

    def state(self) -> dict[str, Any]:
        """What the next update depends on besides options and data: nested dictionaries of tensors, numbers and lists."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimizer.state_dict(),
            "scaler": self.compute.precision.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned in a run with the same options."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimiser"])
        self.compute.precision.scaler.load_state_dict(state["scaler"])

    def _raise_non_finite(self, traces: list[_Trace], when: str, norm: float) -> None:
        with self.group.raise_on_all_ranks():
            message = next((message for trace in traces if (message := trace.first_non_finite(self.options.IAIS))), None)
            if message:
                raise InputError(f"{when}: {message}; lower learning_rate, or check these records with scripts/inspect_db.py")
        with self.group.raise_on_all_ranks():
            raise InputError(f"{when}: the gradient norm is {norm}, expected a finite one; lower learning_rate")


class _Trace(NamedTuple):
    """The parts of a half that are needed to name the pair which caused a non-finite number."""

    anchor: str
    text_ids: tuple[str, ...]
    image_names: tuple[str, ...]
    pairs: Tensor  # (G, 1 + H, 2) on the CPU, indices into the names, the positive first
    hinge: Tensor  # (G, H)
    alignment: Tensor  # (G,)
    gradient: Tensor  # (), finite while the gradient accumulated so far is

    @classmethod
    def of(cls, anchors: AnchorBatch, loss: LossTerms, gradient: FlatGradient) -> _Trace:
        names = anchors.batch.text_ids, anchors.batch.image_names
        return cls(anchors.anchor, *names, loss.pairs, loss.hinge.detach(), loss.alignment.detach(), gradient.finite_mark())

    def first_non_finite(self, regulariser: str | None) -> str | None:
        """Describe the first number of this half that is not finite; None if all are."""
        for group, pairs in enumerate(self.pairs):
            bad = self.hinge[group].isfinite().logical_not().cpu()
            if bool(bad.any()):
                pair = pairs[0] if bool(bad.all()) else pairs[1 + int(bad.nonzero()[0])]
                return f"the score of {self._names(pair)} is not finite"
            if not bool(self.alignment[group].isfinite()):
                return f"the alignment loss {regulariser} of {self._names(pairs[0])} is not finite"
        if not bool(self.gradient.isfinite()):
            positives = ", ".join(self._names(pairs[0]) for pairs in self.pairs[:8])
            return f"the gradient of the {self.anchor}-anchored half of {positives} is not finite, although its loss is"
        return None

    def _names(self, pair: Tensor) -> str:
        text, image = pair.tolist()
        return f"text {self.text_ids[text]!r} and image {self.image_names[image]!r}"

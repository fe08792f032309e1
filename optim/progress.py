"""How far a training has come, and what is due next."""

from __future__ import annotations

from dataclasses import dataclass, field

from optim.options import TrainOptions


@dataclass
class Progress:
    """What a checkpoint says beside its tensors.

    Attributes:
        updates: done so far.
        skipped: those of them that fp16 scaling left out because their gradient was not finite.
        validated: the update after which validation was last done.
        best_update, best: the update that was best in validation, and what was measured there.
    """

    updates: int = 0
    skipped: int = 0
    validated: int = 0
    best_update: int = 0
    best: dict[str, float] = field(default_factory=dict)

    def finished(self, options: TrainOptions) -> bool:
        """Whether nothing is left to do but the final evaluation."""
        return self.updates == options.num_train_steps == self.validated

    def validation_due(self, options: TrainOptions) -> bool:
        """Whether the weights are to be validated before they are updated again."""
        last = self.updates == options.num_train_steps
        return self.updates > self.validated and (last or self.updates % options.valid_steps == 0)

    def checkpoint_due(self, options: TrainOptions) -> bool:
        """Whether to save now: every ``save_steps`` updates, before a validation, which may take long, and after it."""
        return self.updates % options.save_steps == 0 or self.validation_due(options) or self.validated == self.updates

    def updated(self, skipped: bool) -> None:
        """Take note of an update."""
        self.updates += 1
        self.skipped += skipped

    def validated_with(self, measured: dict[str, float]) -> bool:
        """Take note of a validation; says whether it is the best so far."""
        self.validated = self.updates
        better = not self.best or measured["r_mean"] > self.best["r_mean"]
        if better:
            self.best_update, self.best = self.updates, measured
        return better

"""The options of train_itm_hard_negatives.py. Names and defaults are those of the published configurations where there is one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.boxes import ImageOptions
from data.datasets import MAX_TXT_LEN
from model.iais import REGULARISERS
from utils.errors import InputError
from utils.options import MachineOptions, PrecisionName, check_at_least, check_sizes, option, require

LATEST = "latest"  # the value of --resume without a path


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MachineOptions, ImageOptions):
    """Options of train_itm_hard_negatives.py."""

    train_txt_dbs: tuple[str, ...] = option((), "text databases to train on", affects_result=False)
    train_img_dbs: tuple[str, ...] = option((), "the image database of each text database", affects_result=False)
    val_txt_db: str = option("", "text database to validate on", affects_result=False)
    val_img_db: str = option("", "its image database", affects_result=False)
    test_txt_db: str = option("", "text database of the final evaluation", affects_result=False)
    test_img_db: str = option("", "its image database", affects_result=False)
    checkpoint: str | None = option(None, "weights to start from; random ones if none")
    model_config: str = option("config/uniter-base.json", "architecture", affects_result=False)
    output_dir: str = option("", "new or empty folder for checkpoints and logs", affects_result=False)

    max_txt_len: int = option(MAX_TXT_LEN, "train on texts of at most so many word pieces; -1 for all")
    train_batch_size: int = option(8, "micro-steps that each worker accumulates into one update, as in the recipe")
    effective_batch: int | None = option(
        None, "micro-steps of all workers together in one update, instead: 64 is the recipe's 8 x 8, on any number of workers"
    )
    micro_steps_per_pass: int = option(
        1, "micro-steps run through the encoder together: the same update, more memory, fewer passes"
    )
    negative_size: int = option(399, "negatives drawn for each anchor")
    neighbours: str | None = option(
        None, "JSON file, image to images: these, or a text of each, are always among its negatives", affects_result=False
    )
    hard_neg_size: int = option(31, "negatives kept for the loss")
    mining: Literal["hard", "random"] = option("hard", "keep the best-scored negatives, as published, or random ones")
    mining_precision: Literal["auto", PrecisionName] | None = option(
        None, "arithmetic in which candidates are scored to find the hard ones, if not that of precision", affects_result=False
    )
    inf_minibatch_size: int = option(400, "most pairs in one chunk of the encoder; also images a text in quick validation")
    checkpointing: bool = option(
        False, "keep only the layers' inputs for the backward pass and compute the layers again there", affects_result=False
    )
    image_cache: float = option(
        1.0,
        "each worker holds the training images in its device's memory if they take at most so many GiB; 0: none",
        affects_result=False,
    )
    margin: float = option(0.2, "margin of the hinge")

    IAIS: str | None = option(
        None, "alignment loss, one of those in model/iais.py; none for the plain ranking loss", choices=REGULARISERS
    )
    iais_weight: float = option(1.0, "factor of the alignment loss, beside its schedule")
    iais_schedule: Literal["exp", "linear", "log", "const"] = option("exp", "λ_t = exp(5(t/T - 1)), t/T, 1 - exp(-5 t/T), or 1")
    iais_layers: tuple[int, ...] = option((-1,), "layers whose attention is aligned, 0 the first, -1 the last; their mean")
    iais_modality: Literal["alternate", "L", "V"] = option(
        "alternate", "V in the image-anchored and L in the text-anchored half, or one of them in both"
    )
    iais_divide: bool = option(False, "divide the alignment loss by train_batch_size like the ranking loss; published: no")

    learning_rate: float = option(5e-5, "peak learning rate")
    num_train_steps: int = option(5000, "updates")
    warmup_steps: int = option(500, "updates of linear warm-up")
    optim: Literal["adam", "adamax", "adamw"] = option("adamw", "optimiser")
    betas: tuple[float, float] = option((0.9, 0.98), "its decay rates")
    weight_decay: float = option(0.01, "decoupled for adamw; not on biases and LayerNorm weights")
    dropout: float = option(0.1, "dropout everywhere in the encoder")
    grad_norm: float = option(2.0, "clip the gradient's norm to this; -1 for no clipping")
    valid_steps: int = option(500, "updates between validations")
    full_val: bool = option(True, "validate on all pairs; otherwise only 1 positive among inf_minibatch_size images")
    seed: int = option(42, "of weights, sampling and dropout")
    save_steps: int = option(500, "updates between checkpoints of the whole training state", affects_result=False)
    keep_checkpoints: int = option(2, "how many of them to keep, beside that of the best validation", affects_result=False)
    resume: str | None = option(
        None,
        "go on from the last checkpoint in output_dir, if there is one, or from the one named here",
        affects_result=False,
        flag_value=LATEST,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        require(self, "output_dir", "val_txt_db", "val_img_db", "train_txt_dbs", "train_img_dbs")
        if bool(self.test_txt_db) != bool(self.test_img_db):
            raise InputError("test_txt_db and test_img_db: one is given without the other, expected both or neither")
        if len(self.train_txt_dbs) != len(self.train_img_dbs):
            raise InputError(
                f"train_img_dbs names {len(self.train_img_dbs)} databases, expected {len(self.train_txt_dbs)}, "
                "one for each of train_txt_dbs"
            )
        check_at_least(self, 0, "image_cache")
        check_at_least(self, 1, "train_batch_size", "micro_steps_per_pass", "negative_size", "hard_neg_size")
        check_at_least(self, 1 if self.full_val else 2, "inf_minibatch_size")
        check_at_least(self, 1, "num_train_steps", "valid_steps", "save_steps", "keep_checkpoints")
        if self.effective_batch is None:
            self.micro_steps(world_size=1)
        else:
            check_at_least(self, 1, "effective_batch")
        check_at_least(self, 0, "warmup_steps", "n_workers", "seed", "weight_decay", "margin", "iais_weight", "learning_rate")
        if self.hard_neg_size > self.negative_size:
            raise InputError(f"hard_neg_size is {self.hard_neg_size}, expected at most negative_size {self.negative_size}")
        if self.warmup_steps >= self.num_train_steps:
            raise InputError(f"warmup_steps is {self.warmup_steps}, expected fewer than num_train_steps {self.num_train_steps}")
        if self.max_txt_len != -1:
            check_at_least(self, 1, "max_txt_len")
        if not (self.grad_norm > 0 or self.grad_norm == -1):
            raise InputError(f"grad_norm is {self.grad_norm}, expected a positive norm, or -1 for no clipping")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}, expected a probability in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas is {list(self.betas)}, expected two numbers in [0, 1)")
        if not self.iais_layers:
            raise InputError("iais_layers is empty, expected at least one layer")

    def micro_steps(self, world_size: int) -> int:
        """The micro-steps of one update on each of ``world_size`` ranks.

        Raises:
            InputError: ``effective_batch`` cannot be shared out among them, or ``micro_steps_per_pass`` is no divisor.
        """
        count, rest = divmod(self.effective_batch or self.train_batch_size * world_size, world_size)
        if rest:
            raise InputError(f"effective_batch is {self.effective_batch}, expected a multiple of the {world_size} ranks")
        if count % self.micro_steps_per_pass:
            raise InputError(
                f"micro_steps_per_pass is {self.micro_steps_per_pass}, expected a divisor of an update's {count} micro-steps"
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which ``--config`` reads."""
        return asdict(self)

"""The options of train_itm_hard_negatives.py, with the names and defaults of the published configurations."""

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
    train_img_dbs: tuple[str, ...] = option((), "image database of each text database", affects_result=False)
    val_txt_db: str = option("", "text database for validation", affects_result=False)
    val_img_db: str = option("", "its image database", affects_result=False)
    test_txt_db: str = option("", "text database for the final evaluation", affects_result=False)
    test_img_db: str = option("", "its image database", affects_result=False)
    checkpoint: str | None = option(None, "initial weights; random if not given")
    model_config: str = option("config/uniter-base.json", "architecture", affects_result=False)
    output_dir: str = option("", "new or empty folder for checkpoints and logs", affects_result=False)

    max_txt_len: int = option(MAX_TXT_LEN, "maximum number of word pieces of a training text; -1 for no limit")
    train_batch_size: int = option(8, "micro-steps accumulated per update on each rank")
    effective_batch: int | None = option(
        None, "micro-steps per update over all ranks, instead of train_batch_size per rank; 64 is the recipe's 8 x 8"
    )
    micro_steps_per_pass: int = option(
        1, "micro-steps encoded together: the same update with more memory and fewer forward passes"
    )
    negative_size: int = option(399, "negatives sampled per anchor")
    neighbours: str | None = option(
        None,
        "JSON file that maps an image to images which, or whose texts, are always among its negatives",
        affects_result=False,
    )
    hard_neg_size: int = option(31, "negatives kept for the loss")
    mining: Literal["hard", "random"] = option("hard", "keep the highest-scoring negatives, as published, or random ones")
    mining_precision: Literal["auto", PrecisionName] | None = option(
        None, "arithmetic for scoring candidates to mine hard negatives; precision if not given", affects_result=False
    )
    inf_minibatch_size: int = option(400, "maximum number of pairs per chunk; also images per text in quick validation")
    checkpointing: bool = option(
        False, "keep only the layers' inputs for the backward pass and recompute the layers there", affects_result=False
    )
    image_cache: float = option(
        1.0, "hold the training images in each rank's device memory if they take at most this many GiB", affects_result=False
    )
    margin: float = option(0.2, "margin of the hinge loss")

    IAIS: str | None = option(
        None, "regulariser, one of model/iais.py; only the ranking loss if not given", choices=REGULARISERS
    )
    iais_weight: float = option(1.0, "factor on the regulariser, in addition to its schedule")
    iais_schedule: Literal["exp", "linear", "log", "const"] = option("exp", "λ_t = exp(5(t/T - 1)), t/T, 1 - exp(-5 t/T), or 1")
    iais_layers: tuple[int, ...] = option((-1,), "layers to regularise, 0 the first, -1 the last; their losses are averaged")
    iais_modality: Literal["alternate", "L", "V"] = option(
        "alternate", "V in image-anchored and L in text-anchored halves, or one of them in both"
    )
    iais_divide: bool = option(False, "divide the regulariser by train_batch_size like the ranking loss; published: no")

    learning_rate: float = option(5e-5, "peak learning rate")
    num_train_steps: int = option(5000, "number of updates")
    warmup_steps: int = option(500, "updates of linear warm-up")
    optim: Literal["adam", "adamax", "adamw"] = option("adamw", "optimizer")
    betas: tuple[float, float] = option((0.9, 0.98), "decay rates of the optimizer's moments")
    weight_decay: float = option(0.01, "weight decay, decoupled for adamw; not on biases and LayerNorm weights")
    dropout: float = option(0.1, "dropout probability everywhere in the encoder")
    grad_norm: float = option(2.0, "maximum gradient norm; -1 for no clipping")
    valid_steps: int = option(500, "updates between validations")
    full_val: bool = option(True, "validate on all pairs; otherwise on inf_minibatch_size images per text")
    seed: int = option(42, "random seed of weights, sampling and dropout")
    save_steps: int = option(500, "updates between saved training states", affects_result=False)
    keep_checkpoints: int = option(2, "number of training states to keep besides the best", affects_result=False)
    resume: str | None = option(
        None,
        "resume from the last training state in output_dir, if any, or from the given one",
        affects_result=False,
        flag_value=LATEST,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        require(self, "output_dir", "val_txt_db", "val_img_db", "train_txt_dbs", "train_img_dbs")
        if bool(self.test_txt_db) != bool(self.test_img_db):
            raise InputError("test_txt_db and test_img_db: give both or neither")
        if len(self.train_txt_dbs) != len(self.train_img_dbs):
            raise InputError(
                f"train_img_dbs names {len(self.train_img_dbs)} databases, expected {len(self.train_txt_dbs)}: "
                "one per text database in train_txt_dbs"
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
            raise InputError(f"warmup_steps is {self.warmup_steps}, expected less than num_train_steps {self.num_train_steps}")
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
        """Micro-steps per update on each of ``world_size`` ranks.

        Raises:
            InputError: ``effective_batch`` is no multiple of the ranks, or ``micro_steps_per_pass`` no divisor of the result.
        """
        count, rest = divmod(self.effective_batch or self.train_batch_size * world_size, world_size)
        if rest:
            raise InputError(f"effective_batch is {self.effective_batch}, expected a multiple of the {world_size} ranks")
        if count % self.micro_steps_per_pass:
            raise InputError(
                f"micro_steps_per_pass is {self.micro_steps_per_pass}, expected a divisor of {count} (micro-steps per update)"
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``--config`` reads."""
        return asdict(self)

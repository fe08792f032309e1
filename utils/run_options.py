"""The options of the two programs. Names and defaults are those of the published configurations where there is one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from model.iais import REGULARISERS
from utils.errors import InputError
from utils.options import option

LATEST = "latest"  # what --resume means without a path
NO_PICTURES = "without pictures"  # what --report means without a folder


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where and how numbers are computed."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one", free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        None,
        "arithmetic of the encoder; fp32 unless fp16 is set; auto is bf16 where the device computes it fast",
        free=True,
    )
    fp16: bool = option(
        False, "on a CUDA device the same as precision fp16, with loss scaling; elsewhere fp32, with a warning", free=True
    )
    n_workers: int = option(4, "processes that read and decode data; 0 reads in the main process", free=True)
    pin_mem: bool = option(True, "read into page-locked memory when the device is a GPU", free=True)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Which image database of a folder, and which boxes (docs/formats.md)."""

    compressed_db: bool = option(False, "read the database whose records are compressed")
    conf_th: float = option(0.2, "keep boxes of more confidence; -1 for the database of num_bb boxes an image")
    max_bb: int = option(100, "keep at most so many boxes")
    min_bb: int = option(10, "keep at least so many boxes")
    num_bb: int = option(36, "boxes an image when conf_th is -1")

    def image_settings(self) -> dict[str, Any]:
        """The keyword arguments of ``data.image_db.ImageDatabase``."""
        return {
            "compressed": self.compressed_db,
            "conf_th": self.conf_th,
            "max_bb": self.max_bb,
            "min_bb": self.min_bb,
            "num_bb": self.num_bb,
        }


# The options of a training that evaluations take over from its log/hps.json.
FROM_TRAINING = {"train_config": tuple(field.name for field in fields(ImageOptions))}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MachineOptions, ImageOptions):
    """Options of train_itm_hard_negatives.py."""

    train_txt_dbs: tuple[str, ...] = option((), "text databases to train on", free=True)
    train_img_dbs: tuple[str, ...] = option((), "the image database of each text database", free=True)
    val_txt_db: str = option("", "text database to validate on", free=True)
    val_img_db: str = option("", "its image database", free=True)
    test_txt_db: str = option("", "text database of the final evaluation", free=True)
    test_img_db: str = option("", "its image database", free=True)
    checkpoint: str | None = option(None, "weights to start from; random ones if none")
    model_config: str = option("config/uniter-base.json", "architecture", free=True)
    output_dir: str = option("", "new or empty folder for checkpoints and logs", free=True)

    max_txt_len: int = option(60, "train on texts of at most so many word pieces; -1 for all")
    train_batch_size: int = option(8, "micro-steps that each worker accumulates into one update, as in the recipe")
    effective_batch: int | None = option(
        None, "micro-steps of all workers together in one update, instead: 64 is the recipe's 8 x 8, on any number of workers"
    )
    micro_steps_per_pass: int = option(
        1, "micro-steps run through the encoder together: the same update, more memory, fewer passes"
    )
    negative_size: int = option(399, "negatives drawn for each anchor")
    neighbours: str | None = option(
        None, "JSON file, image to images: these, or a text of each, are always among its negatives", free=True
    )
    hard_neg_size: int = option(31, "negatives kept for the loss")
    mining: Literal["hard", "random"] = option("hard", "keep the best-scored negatives, as published, or random ones")
    mining_precision: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        None, "arithmetic in which candidates are scored to find the hard ones, if not that of precision", free=True
    )
    inf_minibatch_size: int = option(400, "most pairs in one chunk of the encoder; also images a text in quick validation")
    checkpointing: bool = option(
        False, "keep only the layers' inputs for the backward pass and compute the layers again there", free=True
    )
    image_cache: float = option(
        1.0,
        "each worker holds the training images in its device's memory if they take at most so many GiB; 0: none",
        free=True,
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
    save_steps: int = option(500, "updates between checkpoints of the whole training state", free=True)
    keep_checkpoints: int = option(2, "how many of them to keep, beside that of the best validation", free=True)
    resume: str | None = option(
        None,
        "go on from the last checkpoint in output_dir, if there is one, or from the one named here",
        free=True,
        bare=LATEST,
    )

    def __post_init__(self) -> None:
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
            self.micro_steps(workers=1)
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

    def micro_steps(self, workers: int) -> int:
        """The micro-steps of one update on each of ``workers``.

        Raises:
            InputError: ``effective_batch`` cannot be shared out among them, or ``micro_steps_per_pass`` is no divisor.
        """
        count, rest = divmod(self.effective_batch or self.train_batch_size * workers, workers)
        if rest:
            raise InputError(f"effective_batch is {self.effective_batch}, expected a multiple of the {workers} workers")
        if count % self.micro_steps_per_pass:
            raise InputError(
                f"micro_steps_per_pass is {self.micro_steps_per_pass}, expected a divisor of an update's {count} micro-steps"
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which ``--config`` reads."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ImageOptions):
    """A trained model, and which boxes it is shown."""

    checkpoint: str = option("", "weights, fine-tuned or only pretrained")
    model_config: str = option("", "architecture; the model.json beside train_config if none")
    train_config: str | None = option(None, "log/hps.json of a training: its box options, where not given here")

    def __post_init__(self) -> None:
        check_sizes(self)
        require(self, "checkpoint")
        if not (self.model_config or self.train_config):
            raise InputError("model_config is missing, it has no default without train_config")

    @property
    def architecture(self) -> Path:
        """The JSON file of the model's architecture."""
        return Path(self.model_config) if self.model_config else Path(self.train_config or "").with_name("model.json")


@dataclass(frozen=True, kw_only=True)
class RetrieverOptions(ModelOptions):
    """What ``evaluation.retriever.Retriever`` is made from."""

    vocab: str | None = option(None, "vocab.txt of the model; that of bert-base-cased if none")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        None, "arithmetic of the encoder; fp32 if none; auto is bf16 where the device computes it fast"
    )


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(MachineOptions, ModelOptions):
    """Options of inf_itm.py."""

    txt_db: str = option("", "text database")
    img_db: str = option("", "its image database")
    output_dir: str = option("", "folder for scores.json and scores.npz")
    batch_size: int = option(400, "most pairs in one chunk of the encoder; changes scores by rounding alone")
    candidates: str | None = option(
        None, 'score these pairs alone, the others rank below: JSONL, {"text": id, "images": [names]} a line'
    )
    report: str | None = option(
        None, "write output_dir/report, a page to look at; with a folder of pictures, with thumbnails", bare=NO_PICTURES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "txt_db", "img_db", "output_dir")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "n_workers")


def require(options: object, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that was given nowhere."""
    for name in names:
        if not getattr(options, name):
            raise InputError(f"{name} is missing, it has no default")


def check_sizes(options: object) -> None:
    """Raise ``InputError`` for the first whole number that is larger than any of them can mean."""
    for name, value in vars(options).items():
        if isinstance(value, int) and value >= 2**31:
            raise InputError(f"{name} is {value}, expected less than {2**31}")


def check_at_least(options: object, least: float, *names: str) -> None:
    """Raise ``InputError`` for the first of these options that is smaller than ``least``, or not a finite number."""
    for name in names:
        value = getattr(options, name)
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"{name} is {value}, expected at least {least}")

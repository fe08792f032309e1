"""The options of evaluation: which model, which boxes, and those of inf_itm.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from data.boxes import ImageOptions
from utils.errors import InputError
from utils.options import MachineOptions, check_at_least, check_sizes, option, require

NO_PICTURES = "without pictures"  # the value of --report without a folder
# The options that evaluations inherit from a training's log/hps.json.
FROM_TRAINING = {"train_config": tuple(field.name for field in fields(ImageOptions))}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ImageOptions):
    """A trained model, and which boxes it is shown."""

    checkpoint: str = option("", "weights, fine-tuned or only pretrained")
    model_config: str = option("", "architecture; the model.json beside train_config if none")
    train_config: str | None = option(None, "log/hps.json of a training: its box options, where not given here")

    def __post_init__(self) -> None:
        super().__post_init__()
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
        None, "write output_dir/report, a page to look at; with a folder of pictures, with thumbnails", flag_value=NO_PICTURES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "txt_db", "img_db", "output_dir")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "n_workers")

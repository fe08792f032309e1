"""Options of the evaluation programs: the model, the boxes it sees, and those of inf_itm.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from data.boxes import ImageOptions
from utils.errors import InputError
from utils.options import MachineOptions, PrecisionName, check_at_least, check_sizes, option, require

NO_PICTURES = "without pictures"  # the value of --report without a folder
# The options that evaluations inherit from a training's log/hps.json.
FROM_TRAINING = {"train_config": tuple(field.name for field in fields(ImageOptions))}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ImageOptions):
    """A trained model and the boxes it sees."""

    checkpoint: str = option("", "weights, fine-tuned or only pretrained")
    model_config: str = option("", "architecture (JSON); defaults to model.json beside train_config")
    train_config: str | None = option(None, "log/hps.json of a training run; box options default to its values")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        require(self, "checkpoint")
        if not (self.model_config or self.train_config):
            raise InputError("model_config is missing; give it, or train_config, whose folder has a model.json")

    @property
    def architecture(self) -> Path:
        """The JSON file of the model's architecture."""
        return Path(self.model_config) if self.model_config else Path(self.train_config or "").with_name("model.json")


@dataclass(frozen=True, kw_only=True)
class RetrieverOptions(ModelOptions):
    """The options of ``evaluation.retriever.Retriever``."""

    vocab: str | None = option(None, "vocab.txt of the model; defaults to that of bert-base-cased")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one")
    precision: Literal["auto", PrecisionName] | None = option(
        None, "precision of the encoder, fp32 by default; auto is bf16 on devices where it is fast"
    )


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(MachineOptions, ModelOptions):
    """Options of inf_itm.py."""

    txt_db: str = option("", "text database")
    img_db: str = option("", "image database of its images")
    output_dir: str = option("", "output folder for scores.json and scores.npz")
    batch_size: int = option(400, "maximum number of pairs per encoder batch; changes scores by rounding only")
    candidates: str | None = option(
        None, 'score only these pairs; JSONL with one {"text": id, "images": [names]} per line; all other pairs rank last'
    )
    report: str | None = option(
        None, "write an HTML report to output_dir/report; given a folder of pictures, with thumbnails", flag_value=NO_PICTURES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "txt_db", "img_db", "output_dir")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "n_workers")

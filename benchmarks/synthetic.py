"""The workload of the benchmarks: random databases of Flickr30k's sizes, random weights, and settings to run them with.

Images have 36 regions on average, 10 to 100; texts have 5 to 30 word pieces.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import CPU
from data.image_db import ImageDatabaseWriter
from data.split import RetrievalSplit
from data.text_db import TextDatabaseWriter
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import TrainOptions
from utils.options import PrecisionName
from utils.precision import Precision

CLASSES = 1601  # of the published detector; their scores are a large part of a record, and are never needed
HARD = 31  # negatives kept for the loss
FIRST_PIECE = 106  # the word pieces below it are special or unused


def write_data(folder: Path, config: UniterConfig, images: int, texts: int) -> None:
    """Write ``folder``/images and ``folder``/texts.db, with text i describing image i modulo ``images``."""
    rng = np.random.default_rng(0)
    names = [f"random_{number:012d}.npz" for number in range(images)]
    with ImageDatabaseWriter(folder / "images") as writer:
        for name in names:
            writer.put(name, **random_regions(rng, config.img_dim))
    specials = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [FIRST_PIECE, config.vocab_size]}
    with TextDatabaseWriter(folder / "texts.db", specials) as writer:
        for number in range(texts):
            ids = rng.integers(FIRST_PIECE, config.vocab_size, int(rng.integers(5, 31)))
            writer.put(str(number), ids, names[number % images])


def random_regions(rng: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    """Return the arrays of an image; half of its features are 0, as after a rectifier."""
    regions = int(np.clip(rng.poisson(36), 10, 100))
    corner, size = rng.random((regions, 2)) / 2, rng.random((regions, 2)) / 2
    return {
        "features": rng.standard_normal((regions, width), np.float32).clip(0).astype(np.float16),
        "norm_bb": np.concatenate([corner, corner + size, size], axis=1).astype(np.float16),
        "conf": np.full(regions, 0.9, np.float16),
        "soft_labels": rng.random((regions, CLASSES), np.float32).astype(np.float16),
    }


def open_split(folder: Path, config: UniterConfig) -> RetrievalSplit:
    """Open the databases that ``write_data`` wrote."""
    return RetrievalSplit(str(folder / "texts.db"), str(folder / "images"), config.input_limits)


def random_model(config: UniterConfig, device: torch.device = CPU) -> RetrievalModel:
    """Return a model with random weights, the same in every process."""
    torch.manual_seed(0)
    return RetrievalModel(config).to(device)


def compute_settings(
    config: UniterConfig, pairs: int, precision: PrecisionName = "fp32", device: torch.device = CPU
) -> ComputeSettings:
    """Return the settings that the programs use, with at most ``pairs`` pairs per chunk."""
    chunk = ChunkSize.for_device(device, config.intermediate_size, pairs)
    return ComputeSettings(Precision(precision, device), chunk, prepare=packed_for_inference)


def train_options(negative_size: int, micro_steps: int = 1) -> TrainOptions:
    """Return the options of a training with IAIS singular; its paths are placeholders."""
    return TrainOptions(
        train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", IAIS="singular",
        train_batch_size=micro_steps, negative_size=negative_size, hard_neg_size=HARD, num_train_steps=1000,
    )  # fmt: skip

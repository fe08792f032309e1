"""What tests/test_workers.py runs on every worker:  worker.py FOLDER; each leaves a file of what it saw."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.batch import AnchorBatch
from data.datasets import HardNegativeDataset
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.alignment import alignment_of_positives
from evaluation.scoring import sampled_candidates, score_matrix
from model.chunks import ChunkSize
from model.retrieval import ComputeSettings
from optim.options import TrainOptions
from optim.trainer import Trainer
from tests.conftest import BUNDLED, CPU, Golden
from utils.distributed import ProcessGroup, connect
from utils.precision import Precision

UPDATES = 3
TEXT_COUNTS = (108, 40, 1)  # seven blocks of sixteen, three, and fewer texts than workers
OPTIONS = TrainOptions(
    train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", train_batch_size=2,
    hard_neg_size=3, num_train_steps=UPDATES, warmup_steps=1, learning_rate=1e-3, IAIS="singular",
)  # fmt: skip


def compute_of() -> ComputeSettings:
    return ComputeSettings(Precision("fp32", CPU), ChunkSize())


def trainer_of(golden: Golden, group: ProcessGroup, dropout: float, **changes: Any) -> Trainer:
    model = golden.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return Trainer(model, dataclasses.replace(OPTIONS, **changes), compute_of(), group)


def task_of(golden: Golden, rank: int, world_size: int) -> HardNegativeDataset:
    steps = OPTIONS.train_batch_size * UPDATES
    return HardNegativeDataset([golden.source()], negative_size=7, micro_steps=steps, seed=3, rank=rank, world_size=world_size)


def train(trainer: Trainer, halves: Iterator[AnchorBatch]) -> dict[str, Any]:
    """What three updates did: after each the gradient and its norm, the weights, and their checksum."""
    seen: dict[str, list[Any]] = {"gradients": [], "norms": [], "weights": [], "checksums": []}
    for number in range(UPDATES):
        seen["norms"].append(trainer.update(halves, number).grad_norm)
        seen["gradients"].append(trainer.gradient.flat.clone())
        seen["weights"].append(torch.cat([tensor.flatten() for tensor in trainer.model.state_dict().values()]))
        seen["checksums"].append(hashlib.sha256(seen["weights"][-1].numpy().tobytes()).hexdigest())
    return seen


def train_on(group: ProcessGroup, dropout: float) -> dict[str, Any]:
    """``train`` on these workers."""
    halves = Loader(CPU)(task_of(BUNDLED, group.rank, group.world_size))
    return train(trainer_of(BUNDLED, group, dropout), halves)


def first_texts(source: RetrievalSplit, count: int) -> RetrievalSplit:
    source.text_db.ids = source.text_db.ids[:count]
    source.text_db.image_of = source.image_of = source.image_of[:count]
    return source


def evaluate(group: ProcessGroup, count: int) -> dict[str, Any]:
    """All scores, some of them, and the alignment, of the first ``count`` texts; nothing on workers other than the first."""
    source, model, loader = first_texts(BUNDLED.source(), count), BUNDLED.model(), Loader(CPU)
    every = score_matrix(model, source, compute_of(), loader, group, cache_bytes=400_000)
    some = score_matrix(model, source, compute_of(), loader, group, candidates=sampled_candidates(source, 5))
    alignment = alignment_of_positives(model, source, compute_of(), loader, group)
    return {"every": every and every.scores, "some": some and some.scores, "alignment": alignment}


def collectives(group: ProcessGroup) -> dict[str, Any]:
    """Each method once, with a value that tells the workers apart."""
    rank = group.rank
    averaged = torch.tensor([1.0, 2.0, 4.0]) * 10**rank
    group.average(averaged)
    broadcast = [torch.full((2, 2), rank), torch.full((3,), rank, dtype=torch.float16)]
    group.broadcast(broadcast)
    nested = {"rank": rank, "tensors": [torch.full((2,), rank + 0.5), torch.tensor(rank)], "none": None}
    gathered = group.gather(np.full(rank, rank) if rank else None)
    return {
        "average": averaged.tolist(),
        "broadcast": [tensor.tolist() for tensor in broadcast],
        "share": group.share(nested),
        "gather": [None if value is None else value.tolist() for value in gathered],
    }


def main(folder: Path) -> None:
    with connect() as group:
        seen = {
            "launcher": group.launcher,
            "collectives": collectives(group),
            "with dropout": train_on(group, 0.1)["checksums"],
            "without dropout": train_on(group, 0.0),
            "evaluations": [evaluate(group, count) for count in TEXT_COUNTS],
        }
        torch.save(seen, folder / f"{group.rank}-of-{group.world_size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

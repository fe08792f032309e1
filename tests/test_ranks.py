"""Several ranks do what one process does. The ranks are real processes, started by horovodrun and by torchrun.

Run as a program,  test_ranks.py FOLDER,  this file is one rank, and leaves in FOLDER what it saw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import torch

from data.batch import AnchorBatch
from data.datasets import HardNegativeDataset
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.alignment import alignment_of_positives
from evaluation.candidates import sampled_candidates
from evaluation.scoring import score_matrix
from model.chunks import ChunkSize
from model.retrieval import ComputeSettings
from optim.options import TrainOptions
from optim.trainer import Trainer
from tests.conftest import BUNDLED, CPU, relative_error
from tests.processes import HOROVOD, ROOT, Forked, finish, start
from utils.distributed import ProcessGroup, SingleProcess, connect
from utils.precision import Precision

UPDATES = 3
TEXT_COUNTS = (108, 40, 1)  # seven blocks of sixteen, three, and fewer texts than ranks
OPTIONS = TrainOptions(
    train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", train_batch_size=2,
    hard_neg_size=3, num_train_steps=UPDATES, warmup_steps=1, learning_rate=1e-3, IAIS="singular",
)  # fmt: skip
COMPUTE = ComputeSettings(Precision("fp32", CPU), ChunkSize())
RUNS = [pytest.param("horovodrun", 2, marks=HOROVOD), ("torchrun", 2), ("torchrun", 3)]
on_all_runs = pytest.mark.parametrize(("launcher", "world_size"), RUNS)


def dataset_of(rank: int, world_size: int) -> HardNegativeDataset:
    steps = OPTIONS.train_batch_size * UPDATES
    return HardNegativeDataset([BUNDLED.source()], negative_size=7, micro_steps=steps, seed=3, rank=rank, world_size=world_size)


def train(group: ProcessGroup, dropout: float, batches: Iterator[AnchorBatch], **changes: Any) -> dict[str, list[Any]]:
    """Do the updates; return, of each, the gradient and its norm, the weights and their checksum."""
    model = BUNDLED.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    trainer = Trainer(model, dataclasses.replace(OPTIONS, **changes), COMPUTE, group)
    seen: dict[str, list[Any]] = {"gradients": [], "norms": [], "weights": [], "checksums": []}
    for number in range(UPDATES):
        seen["norms"].append(trainer.update(batches, number).scalars["grad_norm"])
        seen["gradients"].append(trainer.gradient.flat.clone())
        seen["weights"].append(torch.cat([tensor.flatten() for tensor in model.state_dict().values()]))
        seen["checksums"].append(hashlib.sha256(seen["weights"][-1].numpy().tobytes()).hexdigest())
    return seen


def first_texts(source: RetrievalSplit, count: int) -> RetrievalSplit:
    source.text_db.ids = source.text_db.ids[:count]
    source.text_db.image_of = source.image_of = source.image_of[:count]
    return source


def evaluate(group: ProcessGroup, count: int) -> dict[str, Any]:
    """Return all scores, some of them, and the alignment, of the first ``count`` texts; None on ranks other than 0."""
    source, model, loader = first_texts(BUNDLED.source(), count), BUNDLED.model(), Loader(CPU)
    every = score_matrix(model, source, COMPUTE, loader, group, cache_bytes=400_000)
    some = score_matrix(model, source, COMPUTE, loader, group, candidates=sampled_candidates(source, 5))
    alignment = alignment_of_positives(model, source, COMPUTE, loader, group)
    return {"every": every and every.scores, "some": some and some.scores, "alignment": alignment}


def collectives(group: ProcessGroup) -> dict[str, Any]:
    """Call each collective once, with values that depend on the rank."""
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
        dataset = dataset_of(group.rank, group.world_size)
        seen = {
            "launcher": group.launcher,
            "collectives": collectives(group),
            "with dropout": train(group, 0.1, Loader(CPU)(dataset))["checksums"],
            "without dropout": train(group, 0.0, Loader(CPU)(dataset)),
            "evaluations": [evaluate(group, count) for count in TEXT_COUNTS],
        }
        torch.save(seen, folder / f"{group.rank}-of-{group.world_size}.pt")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what the ranks of (launcher, world size) saw; each such run is started once."""

    @functools.cache
    def by_rank(launcher: str, world_size: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"{launcher}{world_size}")
        words = sys.executable, ROOT / "tests/test_ranks.py", folder
        process = start(launcher, world_size, *words) if launcher else Forked("tests.test_ranks", folder)
        output = finish(process, 200)
        assert process.returncode == 0, output
        return [torch.load(folder / f"{rank}-of-{world_size}.pt", weights_only=False) for rank in range(world_size)]

    return by_rank


@on_all_runs
def test_collectives(seen: Any, launcher: str, world_size: int) -> None:
    mean = sum(10**rank for rank in range(world_size)) / world_size
    for rank, of_rank in enumerate(seen(launcher, world_size)):
        assert f"{world_size} ranks of {launcher}" in of_rank["launcher"]
        result = of_rank["collectives"]
        assert result["average"] == pytest.approx([mean, 2 * mean, 4 * mean])
        assert result["broadcast"] == [[[0, 0], [0, 0]], [0, 0, 0]]
        assert (result["share"]["rank"], result["share"]["none"]) == (0, None)
        assert [tensor.tolist() for tensor in result["share"]["tensors"]] == [[0.5, 0.5], 0]
        assert result["gather"] == ([None, *([other] * other for other in range(1, world_size))] if rank == 0 else [])


@on_all_runs
def test_all_ranks_have_the_same_weights_after_every_update(seen: Any, launcher: str, world_size: int) -> None:
    first, *others = ((of["with dropout"], of["without dropout"]["checksums"]) for of in seen(launcher, world_size))
    assert [len(set(checksums)) for checksums in first] == [UPDATES, UPDATES]
    assert all(other == first for other in others)


@on_all_runs
def test_an_update_is_that_of_one_process_with_the_same_micro_steps(seen: Any, launcher: str, world_size: int) -> None:
    steps = OPTIONS.train_batch_size
    of_ranks = [map(dataset_of(rank, world_size).__getitem__, itertools.count()) for rank in range(world_size)]
    batches = (next(rank) for _ in range(UPDATES) for rank in of_ranks for _ in range(2 * steps))
    alone = train(SingleProcess(), 0.0, batches, effective_batch=steps * world_size)
    together = seen(launcher, world_size)[0]["without dropout"]
    assert relative_error(together["gradients"][0], alone["gradients"][0]) < 1e-6
    assert together["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-6)
    # Later gradients are those of weights that differ by rounding, which Adam amplifies where a gradient is nearly zero:
    # up to 1.2e-6 on an Intel CPU with AVX-512.
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    for update in range(UPDATES):
        assert relative_error(together["weights"][update], alone["weights"][update]) < 1e-6


@on_all_runs
@pytest.mark.parametrize("case", range(len(TEXT_COUNTS)), ids=TEXT_COUNTS)
def test_evaluation_is_that_of_one_process_to_the_bit(seen: Any, launcher: str, world_size: int, case: int) -> None:
    one = seen("", 1)[0]["evaluations"][case]
    assert one["every"].shape == (TEXT_COUNTS[case], len(BUNDLED.source().image_names))
    first, *others = (of_rank["evaluations"][case] for of_rank in seen(launcher, world_size))
    for kind in ("every", "some"):
        assert np.array_equal(first[kind], one[kind])
        assert all(other[kind] is None for other in others)
    assert first["alignment"] == one["alignment"]


@HOROVOD
def test_the_launcher_changes_nothing(seen: Any) -> None:
    for of_horovod, of_torch in zip(seen("horovodrun", 2), seen("torchrun", 2), strict=True):
        assert of_horovod["with dropout"] == of_torch["with dropout"]
        assert of_horovod["without dropout"]["checksums"] == of_torch["without dropout"]["checksums"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

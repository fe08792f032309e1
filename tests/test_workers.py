"""Several workers do what one process does: real processes, started by horovodrun and by torchrun."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import AnchorBatch
from tests.conftest import BUNDLED, relative_error
from tests.forks import Forked
from tests.launch import HOROVOD, ROOT, finish, start
from tests.worker import OPTIONS, TEXT_COUNTS, UPDATES, task_of, train, trainer_of
from utils.distributed import SingleProcess

RUNS = [pytest.param("horovodrun", 2, marks=HOROVOD), ("torchrun", 2), ("torchrun", 3)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the workers of (launcher, count) saw, by rank; each such run is started once."""

    @functools.cache
    def by(launcher: str, workers: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"{launcher}{workers}")
        words = sys.executable, ROOT / "tests/worker.py", folder
        process = start(launcher, workers, *words) if launcher else Forked("tests.worker", folder)
        output = finish(process, 200)
        assert process.returncode == 0, output
        return [torch.load(folder / f"{rank}-of-{workers}.pt", weights_only=False) for rank in range(workers)]

    return by


@pytest.mark.parametrize(("launcher", "workers"), RUNS)
def test_collectives(seen: Any, launcher: str, workers: int) -> None:
    by_rank = seen(launcher, workers)
    mean = sum(10**rank for rank in range(workers)) / workers
    for rank, worker in enumerate(by_rank):
        assert launcher in worker["launcher"]
        result = worker["collectives"]
        assert result["average"] == pytest.approx([mean, 2 * mean, 4 * mean])
        assert result["broadcast"] == [[[0, 0], [0, 0]], [0, 0, 0]]
        assert (result["share"]["rank"], result["share"]["none"]) == (0, None)
        assert [tensor.tolist() for tensor in result["share"]["tensors"]] == [[0.5, 0.5], 0]
        assert result["gather"] == ([None, *([other] * other for other in range(1, workers))] if rank == 0 else [])


@pytest.mark.parametrize(("launcher", "workers"), RUNS)
def test_all_workers_have_the_same_weights_after_every_update(seen: Any, launcher: str, workers: int) -> None:
    by_rank = seen(launcher, workers)
    for kind in (lambda worker: worker["with dropout"], lambda worker: worker["without dropout"]["checksums"]):
        assert len(set(kind(by_rank[0]))) == UPDATES
        assert all(kind(worker) == kind(by_rank[0]) for worker in by_rank)


@pytest.mark.parametrize(("launcher", "workers"), RUNS)
def test_an_update_is_that_of_one_process_fed_the_same_micro_steps(seen: Any, launcher: str, workers: int) -> None:
    steps = OPTIONS.train_batch_size
    tasks = [task_of(BUNDLED, worker, workers) for worker in range(workers)]

    def halves() -> Iterator[AnchorBatch]:
        for update in range(UPDATES):
            for task in tasks:
                yield from (task[number] for number in range(2 * steps * update, 2 * steps * (update + 1)))

    alone = train(trainer_of(BUNDLED, SingleProcess(), 0.0, effective_batch=steps * workers), halves())
    together = seen(launcher, workers)[0]["without dropout"]
    assert relative_error(together["gradients"][0], alone["gradients"][0]) < 1e-6
    assert together["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-6)
    # Later gradients are those of weights that differ by rounding, of which Adam makes more where a gradient is nearly zero:
    # up to 1.2e-6 on an Intel CPU with AVX-512.
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    for update in range(UPDATES):
        assert relative_error(together["weights"][update], alone["weights"][update]) < 1e-6


@pytest.mark.parametrize(("launcher", "workers"), RUNS)
@pytest.mark.parametrize("case", range(len(TEXT_COUNTS)), ids=TEXT_COUNTS)
def test_evaluation_is_that_of_one_process_to_the_bit(seen: Any, launcher: str, workers: int, case: int) -> None:
    one = seen("", 1)[0]["evaluations"][case]
    assert one["every"].shape == (TEXT_COUNTS[case], len(BUNDLED.source().image_names))
    first, *others = (worker["evaluations"][case] for worker in seen(launcher, workers))
    for kind in ("every", "some"):
        assert np.array_equal(first[kind], one[kind])
        assert all(other[kind] is None for other in others)
    assert first["alignment"] == one["alignment"]


@HOROVOD
def test_the_launcher_changes_nothing(seen: Any) -> None:
    of_horovod, of_torch = seen("horovodrun", 2), seen("torchrun", 2)
    for rank in range(2):
        assert of_horovod[rank]["with dropout"] == of_torch[rank]["with dropout"]
        assert of_horovod[rank]["without dropout"]["checksums"] == of_torch[rank]["without dropout"]["checksums"]

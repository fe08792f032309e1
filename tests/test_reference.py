"""The program against the benchmark's plain implementation: the same scores and gradients, and what bf16 changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.run
from benchmarks.machine import in_new_process
from benchmarks.reference import Reference, read
from data.datasets import HardNegativeDataset
from data.loader import Loader
from evaluation.recall import ranks, recalls
from evaluation.scoring import score_matrix
from model.objective import Objective
from model.retrieval import ComputeSettings, RetrievalModel, hardest
from tests.conftest import CPU, Golden
from utils.distributed import SingleProcess
from utils.files import read_json
from utils.precision import Precision

CANDIDATES, HARD = 24, 7
BF16 = Precision("bf16", CPU)


def test_scores(bundled: Golden, compute: ComputeSettings, loader: Loader) -> None:
    split, model = bundled.source(), bundled.model()
    fast = score_matrix(model, split, compute, loader, SingleProcess())
    slow = Reference(model).evaluate(split, fast.text_ids[::20], fast.image_names[:], 16, CPU)
    np.testing.assert_allclose(fast.scores[::20], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1], ids=["image-anchored", "text-anchored"])
def test_half(bundled: Golden, compute: ComputeSettings, number: int) -> None:
    """Candidate scores, loss and gradient agree, with the same hard negatives and without dropout."""
    split, model = bundled.source(), RetrievalModel(bundled.config.with_dropout(0.0))
    model.load_state_dict(bundled.model().state_dict())
    dataset = HardNegativeDataset([split], negative_size=CANDIDATES - 1, micro_steps=1)
    half, reference = dataset[number], Reference(model)
    batch = read(split, [pair[1:] for pair in dataset.candidates(half.anchor, 0)])
    objective = Objective(HARD, 0.2, regulariser="singular", layers=(bundled.config.num_hidden_layers - 1,))
    candidates = objective.mine(model, half, compute)
    torch.testing.assert_close(candidates[0], reference.mine(batch), atol=1e-5, rtol=1e-5)

    terms = objective.loss(model, half, compute, candidates)
    fast = terms.hinge.mean() + terms.alignment.sum()
    slow = reference.loss(batch, candidates[0], HARD, "singular", "V" if half.anchor == "image" else "L")
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters, materialize_grads=True)])
        for loss in (fast, slow)
    )
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_bf16_mines_the_same_negatives(bundled: Golden, compute: ComputeSettings) -> None:
    """At least 90 %: random weights give all candidates similar scores. After training it is over 95 % (docs/log.md)."""
    model, objective = bundled.model(), Objective(HARD, 0.2)
    dataset = HardNegativeDataset([bundled.source()], negative_size=CANDIDATES - 1, micro_steps=12)
    same = 0
    for number in range(len(dataset)):
        exact, rough = (
            hardest(objective.mine(model, dataset[number], settings), HARD)[0, 1:]
            for settings in (compute, replace(compute, mining=BF16))
        )
        same += int(torch.isin(exact, rough).sum())
    assert same >= 0.9 * HARD * len(dataset)


def test_bf16_leaves_recall_as_it_is(bundled: Golden, compute: ComputeSettings, loader: Loader) -> None:
    split, model = bundled.source(), bundled.model()
    exact, rough = (
        recalls(ranks(score_matrix(model, split, settings, loader, SingleProcess()).scores, split.image_of))
        for settings in (compute, replace(compute, precision=BF16))
    )
    assert rough["r_mean"] == pytest.approx(exact["r_mean"], abs=0.003)


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Small parts, once each, the first in a new process; the ratios printed are those of the numbers saved."""
    measured = []

    def measure(function: Any, *arguments: Any) -> Any:
        measured.append(in_new_process(function, *arguments) if not measured else function(*arguments))
        return measured[-1]

    monkeypatch.setattr(benchmarks.run, "in_new_process", measure)
    monkeypatch.setattr(benchmarks.run, "HALVES", 2)
    small = "--models tiny --precisions fp32 --turns 1 --candidates 33 --texts 2"
    parts = ["--parts", "loader", "evaluation", "micro_step"]
    benchmarks.run.main([*small.split(), *parts, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "found.json")["tiny"]
    assert [turns[0] for runs in found.values() for turns in runs.values()] == measured
    assert list(found) == parts[1:]
    for part, name in (("evaluation", "pairs/s"), ("loader", "images/s"), ("loader", "decoded images/s")):
        ratio = found[part]["fp32"][0][name] / found[part]["reference"][0][name]
        assert f"({ratio:.2f}x)" in printed
    step = found["micro_step"]["fp32"][0]
    seconds = sum(
        step[f"{anchor}-anchored {name}"] for anchor in ("image", "text") for name in ("mining", "hard pass", "backward")
    )
    assert seconds + step["optimizer"] == pytest.approx(step["seconds"])

"""The fast path beside the straightforward one of the benchmark: the same scores and gradients, and what bf16 changes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.run
from benchmarks.reference import Reference, read
from data.datasets import HardNegativeDataset
from data.loader import Loader
from evaluation.recall import ranks, recalls
from evaluation.scoring import score_matrix
from model.objective import Objective
from model.retrieval import ComputeSettings, hardest
from tests.conftest import CPU, Golden
from tests.forks import Forked
from tests.launch import finish
from utils.distributed import SingleProcess
from utils.files import read_json
from utils.precision import Precision

CANDIDATES, HARD = 24, 7


@pytest.fixture
def bf16(compute: ComputeSettings) -> ComputeSettings:
    return replace(compute, precision=Precision("bf16", CPU))


def test_scores(bundled: Golden, compute: ComputeSettings, loader: Loader) -> None:
    source, model = bundled.source(), bundled.model()
    fast = score_matrix(model, source, compute, loader, SingleProcess())
    texts = fast.text_ids[::20]
    slow = Reference(model).evaluate(source, texts, fast.image_names[:], 16, CPU)
    np.testing.assert_allclose(fast.scores[::20], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1], ids=["image-anchored", "text-anchored"])
def test_half(bundled: Golden, compute: ComputeSettings, number: int) -> None:
    """Candidate scores, loss and gradient, both with the same hard negatives and without dropout."""
    source, model = bundled.source(), bundled.model()
    model.uniter.config = bundled.config.with_dropout(0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.uniter.encoder.layer:
        block.attention.self.dropout = 0.0
    task = HardNegativeDataset([source], negative_size=CANDIDATES - 1, micro_steps=1)
    half, reference = task[number], Reference(model)
    batch = read(source, [(text, name) for _, text, name in task.candidates(half.anchor, 0)])
    objective = Objective(HARD, 0.2, regulariser="singular", layers=(bundled.config.num_hidden_layers - 1,))
    candidates = objective.mine(model, half, compute)
    torch.testing.assert_close(candidates[0], reference.mine(batch), atol=1e-5, rtol=1e-5)

    gradients = []
    fast = objective.loss(model, half, compute, candidates)
    slow = reference.loss(batch, candidates[0], HARD, "singular", "V" if half.anchor == "image" else "L")
    for loss in (fast.hinge.mean() + fast.alignment.sum(), slow):
        model.zero_grad()
        loss.backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        )
    assert float((fast.hinge.mean() + fast.alignment.sum()).detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_bf16_mines_the_same_negatives(bundled: Golden, compute: ComputeSettings, bf16: ComputeSettings) -> None:
    """Nearly: random weights score all candidates much alike. After training it is 95 % and more (docs/performance.md)."""
    model, objective = bundled.model(), Objective(HARD, 0.2)
    task = HardNegativeDataset([bundled.source()], negative_size=CANDIDATES - 1, micro_steps=12)
    same = total = 0
    for number in range(len(task)):
        half = task[number]
        chosen = [
            set(hardest(objective.mine(model, half, how), HARD)[0, 1:].tolist())
            for how in (compute, replace(compute, mining=bf16.precision))
        ]
        same, total = same + len(chosen[0] & chosen[1]), total + HARD
    assert same >= 0.9 * total, f"{same} of {total}"


def test_bf16_leaves_recall_as_it_is(bundled: Golden, compute: ComputeSettings, bf16: ComputeSettings, loader: Loader) -> None:
    source, model = bundled.source(), bundled.model()
    exact, rough = (
        recalls(ranks(score_matrix(model, source, how, loader, SingleProcess()).scores, source.image_of))
        for how in (compute, bf16)
    )
    assert rough["r_mean"] == pytest.approx(exact["r_mean"], abs=0.003)


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Most parts once, small, the first as a process, the others forked; the ratios printed are those of what was written."""
    command = ["--models", "tiny", "--precisions", "fp32", "--candidates", "33"]
    small = [
        "--parts",
        "loader",
        "evaluation",
        "micro_step",
        "--texts",
        "2",
        "--halves",
        "2",
        "--n_workers",
        "0",
        "--turns",
        "1",
    ]
    start, words_of = subprocess.run, []

    def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        words_of.append(words)
        if len(words_of) == 1:
            return start(words, **how)
        process = Forked("benchmarks.run", *words[2:])
        output = finish(process, 100)
        return subprocess.CompletedProcess(words, process.returncode or 0, output)

    monkeypatch.setattr(benchmarks.run, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", *command, *small, "--json", str(tmp_path / "found.json")])
    benchmarks.run.main()
    assert {tuple(words[:2]) for words in words_of} == {(sys.executable, benchmarks.run.__file__)}
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "found.json")["tiny"]
    assert sorted(found) == ["evaluation", "loader", "micro_step"]
    for part, name in (("evaluation", "pairs/s"), ("loader", "images/s"), ("loader", "decoded images/s")):
        ratio = found[part]["fp32"][0][name] / found[part]["reference"][0][name]
        assert f"({ratio:.2f}x)" in printed
    step = found["micro_step"]["fp32"][0]
    parts = [
        step[f"{anchor}-anchored half"][name] for anchor in ("image", "text") for name in ("mining", "hard pass", "backward")
    ]
    assert sum(parts) + step["optimiser"] == pytest.approx(step["seconds"])

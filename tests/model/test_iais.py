"""What every regulariser has to satisfy, each against its naive twin, and that a further one is a function and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_itm_hard_negatives
from data.loader import Loader
from evaluation.alignment import alignment_of_positives
from model.iais import (
    MODALITIES,
    REGULARISERS,
    Blocks,
    Modality,
    PairAttention,
    Regulariser,
    cacr,
    congruent_pseudo,
    distributed,
    distributed_pseudo,
    nearest,
    regulariser,
    singular,
    singular_pseudo,
)
from model.retrieval import ComputeSettings
from tests import naive
from tests.conftest import BUNDLED, Golden
from tests.test_programs import fails, training
from utils.distributed import SingleProcess
from utils.logging import read_scalars

HEADS, WORDS, REGIONS = 3, 5, 4
EPSILON = 1e-4  # of distributed, whose logarithms have 1e-6 in them

every_regulariser = pytest.mark.parametrize("kind", REGULARISERS.values(), ids=list(REGULARISERS))
both_ways = pytest.mark.parametrize("modality", MODALITIES)


def random_scores(seed: int = 0, words: int = WORDS, regions: int = REGIONS, scale: float = 2.0) -> Tensor:
    size = words + 2 + regions
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(HEADS, size, size, generator=generator, dtype=torch.float64)


def random_blocks(seed: int = 0, words: int = WORDS, regions: int = REGIONS, scale: float = 2.0) -> Blocks:
    return PairAttention.of_map(random_scores(seed, words, regions, scale), words + 2)


@both_ways
@every_regulariser
def test_the_twin_agrees(kind: Regulariser, modality: Modality) -> None:
    for seed, (words, regions) in enumerate([(5, 4), (2, 7), (1, 3), (6, 1)]):
        scores = random_scores(seed, words, regions)
        expected = naive.alignment(kind.__name__, list(scores), words + 2, modality)
        actual = kind(PairAttention.of_map(scores, words + 2), modality).item()
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)


@both_ways
@every_regulariser
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_finite_and_not_negative(kind: Regulariser, modality: Modality, scale: float) -> None:
    """Also where attention is so peaked that it underflows; and so is the gradient."""
    for words, regions in [(WORDS, REGIONS), (1, REGIONS), (WORDS, 1), (1, 1)]:
        scores = random_scores(1, words, regions, scale).float().requires_grad_()
        loss = kind(PairAttention.of_map(scores, words + 2), modality)
        loss.backward()
        assert -EPSILON < loss.item() < float("inf")
        assert scores.grad is not None
        assert bool(scores.grad.isfinite().all())


@every_regulariser
def test_zero_where_nothing_differs(kind: Regulariser) -> None:
    """Attention that is even everywhere agrees with itself; and a single word can attend to nothing but itself."""
    for modality in MODALITIES:
        assert abs(kind(PairAttention.of_map(torch.zeros(HEADS, 11, 11), WORDS + 2), modality).item()) < EPSILON
        assert kind(random_blocks(), modality).item() > 100 * EPSILON
    assert abs(kind(random_blocks(words=1), "L").item()) < EPSILON
    assert abs(kind(random_blocks(regions=1), "V").item()) < EPSILON


@every_regulariser
def test_the_modalities_mirror_each_other(kind: Regulariser) -> None:
    blocks = random_blocks()
    assert torch.equal(kind(blocks, "V"), kind(blocks.mirrored(), "L"))
    assert not torch.equal(kind(blocks, "V"), kind(blocks, "L"))


@both_ways
@every_regulariser
def test_order_of_words_and_regions_changes_nothing(kind: Regulariser, modality: Modality) -> None:
    scores = random_scores()
    order = torch.tensor([0, 3, 1, 5, 2, 4, 6, *(7 + torch.tensor([2, 0, 3, 1])).tolist()])
    permuted = scores[:, order][:, :, order]
    expected = kind(PairAttention.of_map(scores, WORDS + 2), modality)
    torch.testing.assert_close(kind(PairAttention.of_map(permuted, WORDS + 2), modality), expected)


@both_ways
@every_regulariser
def test_gradient_reaches_queries_and_keys(kind: Regulariser, modality: Modality) -> None:
    """Those of the modality itself at least; and what is there is the derivative, with what lies across held fixed."""
    size = WORDS + 2 + REGIONS
    generator = torch.Generator().manual_seed(2)
    queries, keys = (torch.randn(HEADS, size, 8, generator=generator, requires_grad=True) for _ in range(2))
    kind(PairAttention.of_map(queries @ keys.mT, WORDS + 2), modality).backward()
    own = slice(1, WORDS + 1) if modality == "L" else slice(WORDS + 2, None)
    for part in (queries, keys):
        assert part.grad is not None
        assert bool((part.grad[:, own].abs().amax(dim=2) > 0).all())

    blocks = random_blocks()

    def loss(words: Tensor, regions: Tensor) -> Tensor:
        return kind(blocks._replace(LL=words.log_softmax(dim=-1), VV=regions.log_softmax(dim=-1)), modality)

    within = [torch.randn(n, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (WORDS, REGIONS)]
    assert torch.autograd.gradcheck(loss, within)


@both_ways
def test_what_lies_across_has_its_derivative_too(modality: Modality) -> None:
    """Of the published losses, all of it: an argmax changes nothing where it does not jump."""
    for kind in (singular, distributed):
        scores = random_scores(3).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda scores, kind=kind: kind(PairAttention.of_map(scores, WORDS + 2), modality), scores
        )


@both_ways
def test_congruence_has_no_gradient_across(modality: Modality) -> None:
    blocks = random_blocks()
    across = {name: getattr(blocks, name).requires_grad_() for name in ("LV", "VL")}
    assert not cacr(blocks._replace(**across), modality).requires_grad


def test_pseudo_attention_by_hand() -> None:
    """Two words and two regions; the second word attends to the first region, the first word to the second."""
    within, across, back = (torch.tensor(rows, dtype=torch.float64) for rows in (
        [[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [1.0, 0.0]], [[0.5, 0.5], [0.25, 0.75]],
    ))  # fmt: skip
    own = Blocks(LL=within.log(), VV=within.log(), LV=across.log(), VL=back.log())
    assert nearest(own).tolist() == [1, 0]
    torch.testing.assert_close(singular_pseudo(own).exp(), within[[1, 0]][:, [1, 0]].softmax(dim=-1))
    assert distributed_pseudo(own).flatten().tolist() == pytest.approx([0.3, 0.7, 0.5, 0.5])
    # Word 0, by way of regions (0.2, 0.8), attends to regions (0.5, 0.5) and word 1 to (0.9, 0.1).
    congruent = torch.tensor([[0.5, 0.5], [0.26, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(congruent_pseudo(own).exp(), congruent.softmax(dim=-1))


@pytest.fixture
def fourth(monkeypatch: pytest.MonkeyPatch) -> str:
    """A regulariser as a reader of model/iais.py would add one."""
    monkeypatch.setitem(REGULARISERS, "squared", singular)  # so that it is gone afterwards

    @regulariser
    def squared(own: Blocks) -> Tensor:
        return (distributed_pseudo(own) - own.LL.exp()).square().sum(dim=-1).mean()

    return "squared"


def test_a_fourth_is_one_function(
    fourth: str, bundled: Golden, compute: ComputeSettings, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name alone it is an option that a training takes, and a number that evaluation gives."""
    options = {"num_train_steps": 1, "warmup_steps": 0, "inf_minibatch_size": 8}
    databases = BUNDLED.text_db, BUNDLED.image_db
    train_itm_hard_negatives.main(training(*databases, tmp_path / "run", "--no-full_val", "--IAIS", fourth, **options))
    assert json.loads((tmp_path / "run/log/hps.json").read_text())["IAIS"] == fourth
    assert read_scalars(tmp_path / "run/log")["train/iais"][1] > 0

    measured = alignment_of_positives(bundled.model(), bundled.source(), compute, loader, SingleProcess())
    assert list(measured) == list(REGULARISERS)
    assert all(measured[fourth][modality] > 0 for modality in MODALITIES)

    with pytest.raises(SystemExit):
        train_itm_hard_negatives.main(["--help"])
    assert "|".join(REGULARISERS) in capsys.readouterr().out
    config = tmp_path / "run.json"
    config.write_text('{"IAIS": "squarred"}')
    for given in (["--IAIS", "squarred"], ["--config", str(config)]):
        line = fails(capsys, train_itm_hard_negatives.main, given)
        assert "IAIS" in line
        assert line.endswith(f"\"squarred\" given, expected one of {', '.join(REGULARISERS)} (did you mean 'squared'?)")

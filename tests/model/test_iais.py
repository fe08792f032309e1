"""What every regulariser must satisfy, what alignment losses must satisfy besides, and that a new one is one function."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.iais import MODALITIES, REGULARISERS, Blocks, Modality, PairAttention, Regulariser, cacr, distributed, singular
from tests import naive
from tests.conftest import BUNDLED
from tests.scripts.test_visualize import pair, svg_texts
from tests.test_programs import inference, training
from utils.logging import read_scalars

ROOT = Path(__file__).parents[2]
HEADS, WORDS, REGIONS = 3, 5, 4
EPSILON = 1e-4  # of distributed, whose logarithms have 1e-6 in them

ALIGNMENTS = [loss for loss in REGULARISERS.values() if loss.alignment]
every_regulariser = pytest.mark.parametrize("loss", REGULARISERS.values(), ids=list(REGULARISERS))
every_alignment = pytest.mark.parametrize("loss", ALIGNMENTS, ids=[loss.name for loss in ALIGNMENTS])
both_modalities = pytest.mark.parametrize("modality", MODALITIES)


def random_scores(seed: int = 0, words: int = WORDS, regions: int = REGIONS, scale: float = 2.0) -> Tensor:
    size = words + 2 + regions
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(HEADS, size, size, generator=generator, dtype=torch.float64)


def random_pair(seed: int = 0, words: int = WORDS, regions: int = REGIONS) -> PairAttention:
    return PairAttention.of_map(random_scores(seed, words, regions), words + 2)


@both_modalities
@every_regulariser
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_loss_and_gradient_are_finite(loss: Regulariser, modality: Modality, scale: float) -> None:
    """Also if attention is so peaked that it underflows."""
    for words, regions in [(WORDS, REGIONS), (1, REGIONS), (WORDS, 1), (1, 1)]:
        scores = random_scores(1, words, regions, scale).float().requires_grad_()
        value = loss(PairAttention.of_map(scores, words + 2), modality)
        assert value.shape == ()
        assert bool(value.isfinite())
        value.backward()
        assert scores.grad is not None
        assert bool(scores.grad.isfinite().all())


@both_modalities
@every_regulariser
def test_order_of_words_and_regions_does_not_matter(loss: Regulariser, modality: Modality) -> None:
    scores = random_scores()
    order = torch.tensor([0, 3, 1, 5, 2, 4, 6, *(7 + torch.tensor([2, 0, 3, 1])).tolist()])
    permuted = scores[:, order][:, :, order]
    expected = loss(PairAttention.of_map(scores, WORDS + 2), modality)
    torch.testing.assert_close(loss(PairAttention.of_map(permuted, WORDS + 2), modality), expected)


@both_modalities
@every_regulariser
def test_gradient_reaches_queries_and_keys(loss: Regulariser, modality: Modality) -> None:
    """At least those of the modality itself."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = (torch.randn(HEADS, WORDS + 2 + REGIONS, 8, generator=generator, requires_grad=True) for _ in range(2))
    loss(PairAttention.of_map(queries @ keys.mT, WORDS + 2), modality).backward()
    rows = slice(1, WORDS + 1) if modality == "L" else slice(WORDS + 2, None)
    for part in (queries, keys):
        assert part.grad is not None
        assert bool((part.grad[:, rows].abs().amax(dim=2) > 0).all())


@both_modalities
@every_alignment
def test_the_twin_agrees(loss: Regulariser, modality: Modality) -> None:
    for seed, (words, regions) in enumerate([(5, 4), (2, 7), (1, 3), (6, 1)]):
        scores = random_scores(seed, words, regions)
        expected = naive.alignment(loss.name, list(scores), words + 2, modality)
        actual = loss(PairAttention.of_map(scores, words + 2), modality).item()
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert actual > -EPSILON


@every_alignment
def test_zero_for_even_attention(loss: Regulariser) -> None:
    """And for a single word or region, which can attend to nothing but itself."""
    for modality in MODALITIES:
        assert abs(loss(PairAttention.of_map(torch.zeros(HEADS, 11, 11), WORDS + 2), modality).item()) < EPSILON
        assert loss(random_pair(), modality).item() > 100 * EPSILON
    assert abs(loss(random_pair(words=1), "L").item()) < EPSILON
    assert abs(loss(random_pair(regions=1), "V").item()) < EPSILON


@every_alignment
def test_the_modalities_mirror_each_other(loss: Regulariser) -> None:
    """Exchanging words and regions exchanges the two losses."""
    scores, words = random_scores(), WORDS + 2
    order = [0, *range(words, words + REGIONS), words - 1, *range(1, words - 1)]  # [CLS], regions as words, [SEP], words
    exchanged = PairAttention.of_map(scores[:, order][:, :, order], REGIONS + 2)
    pair = PairAttention.of_map(scores, words)
    assert torch.equal(loss(pair, "V"), loss(exchanged, "L"))
    assert torch.equal(loss(pair, "L"), loss(exchanged, "V"))
    assert not torch.equal(loss(pair, "V"), loss(pair, "L"))


@both_modalities
def test_published_losses_have_their_derivatives(modality: Modality) -> None:
    """An argmax changes nothing where it does not jump."""
    for loss in (singular, distributed):
        scores = random_scores(3).requires_grad_()
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(PairAttention.of_map(s, WORDS + 2), modality), scores)


@both_modalities
def test_congruence_has_no_gradient_across(modality: Modality) -> None:
    intra, cross, cross_back, other = random_pair().scores
    scores = Blocks(intra, cross.requires_grad_(), cross_back.requires_grad_(), other)
    assert not cacr(PairAttention(scores, "L", 0), modality).requires_grad


def test_per_head_and_averaged_attention() -> None:
    scores = random_scores()
    pair = PairAttention.of_map(scores, WORDS + 2, layer=7)
    assert (pair.layer, pair.seen_from("V").layer, pair.seen_from("V").modality) == (7, 7, "V")
    words_to_regions = scores[:, 1 : WORDS + 1, WORDS + 2 :].softmax(dim=-1)
    torch.testing.assert_close(pair.per_head().cross.exp(), words_to_regions)
    torch.testing.assert_close(pair.head_mean().cross.exp(), words_to_regions.mean(dim=0))
    assert torch.equal(pair.seen_from("V").head_mean().cross_back, pair.head_mean().cross)


def test_a_new_regulariser_is_one_function(tmp_path: Path, few_texts: Path) -> None:
    """The ten lines of README, appended to a copy of the tree: the copy trains with them, shows their values and tests them."""
    (lines,) = re.findall(r"```python\n(@regulariser\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert lines.count("\n") <= 10
    tree, run = tmp_path / "tree", tmp_path / "run"
    ignored = shutil.ignore_patterns(".git", ".venv", "demo", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    with open(tree / "model/iais.py", "a") as file:
        file.write(f"\n\n{lines}")

    def python(*words: str | Path) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    options = {"num_train_steps": 1, "warmup_steps": 0, "inf_minibatch_size": 8}
    words = training(BUNDLED.text_db, BUNDLED.image_db, run, "--no-full_val", "--IAIS", "squared", **options)
    python("train_itm_hard_negatives.py", *words)
    assert read_scalars(run / "log")["train/iais"][1] > 0
    assert "singular|distributed|cacr|squared" in python("train_itm_hard_negatives.py", "--help")
    words = inference(few_texts, BUNDLED.image_db, tmp_path / "out")
    assert re.search(r"\nsquared +0\.\d+ +0\.\d+\n", python("inf_itm.py", *words, "--report"))
    assert '<th scope="col">squared</th>' in (tmp_path / "out/report/index.html").read_text()
    python("scripts/visualize.py", *pair(tmp_path / "pair.svg", show="boxes"))
    assert any(re.match(r"squared +0\.0", text) for text in svg_texts(tmp_path / "pair.svg"))
    python("-m", "ruff", "check", "model/iais.py")
    python("-m", "pytest", "-q", "tests/test_docs.py")
    assert "squared" in python("-m", "pytest", "-v", "tests/model/test_iais.py", "-k", "squared")

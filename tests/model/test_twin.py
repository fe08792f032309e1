"""The fast path against the naive twin on ragged inputs, and that results do not depend on how the work is divided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from data.batch import AnchorBatch, PairBatch, Ragged, collate
from data.image_db import Image
from data.text_db import Text
from model.chunks import ChunkSize, chunks
from model.config import UniterConfig
from model.iais import MODALITIES, PairAttention, distributed, singular
from model.objective import Objective
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import MapRequest
from tests import naive

CONFIG = UniterConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, max_position_embeddings=64,
    initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, img_dim=17,
)  # fmt: skip
TEXT_LENGTHS = [1, 60, 2, 13, 7]  # word pieces
IMAGE_LENGTHS = [100, 1, 36, 10]


def random_batch(
    seed: int, pairs: torch.Tensor, text_lengths: Sequence[int] = TEXT_LENGTHS, image_lengths: Sequence[int] = IMAGE_LENGTHS
) -> PairBatch:
    rng = np.random.default_rng(seed)
    texts = [Text(str(i), rng.integers(3, 50, n), "", {}) for i, n in enumerate(text_lengths)]
    images = [
        Image(f"{i}.npz", rng.standard_normal((n, 17)).astype(np.float16), rng.random((n, 7)).astype(np.float32))
        for i, n in enumerate(image_lengths)
    ]
    return collate(texts, images, pairs, cls_id=1, sep_id=2, limits=CONFIG.input_limits)


def pair_of(batch: PairBatch, number: int) -> naive.Pair:
    text, image = batch.pairs[number].tolist()

    def item(ragged: Ragged, index: int) -> slice:
        start = int(ragged.lengths[:index].sum())
        return slice(start, start + int(ragged.lengths[index]))

    regions = item(batch.features, image)
    return naive.Pair(
        batch.tokens.rows[item(batch.tokens, text)].tolist(), batch.features.rows[regions].numpy(), batch.boxes[regions].numpy()
    )


@pytest.fixture(scope="module")
def model() -> RetrievalModel:
    torch.manual_seed(3)
    model = RetrievalModel(CONFIG)
    for parameter in model.parameters():  # biases and LayerNorms too, so that leaving one out would show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


ALL = torch.cartesian_prod(torch.arange(len(TEXT_LENGTHS)), torch.arange(len(IMAGE_LENGTHS)))


def test_scores_and_alignment_match_the_twin(model: RetrievalModel, compute: ComputeSettings) -> None:
    pairs = torch.tensor([[0, 1], [1, 0], [3, 3], [4, 1], [0, 3], [2, 2]])  # (text, image): 1 or 60 words, 1 to 100 regions
    batch = random_batch(0, pairs)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        scored = model(batch, compute, MapRequest(range(len(pairs)), [0, 2]))
        for number in range(len(pairs)):
            score, maps = naive.forward(weights, pair_of(batch, number), heads=3, layers=3)
            assert scored.scores[number].item() == pytest.approx(score.item(), abs=1e-5)
            length = int(batch.tokens.lengths[batch.pairs[number, 0]])
            for layer in (0, 2):
                torch.testing.assert_close(scored.maps[layer][number].double(), torch.stack(maps[layer]), atol=1e-4, rtol=1e-4)
            for loss in (singular, distributed):
                for modality in MODALITIES:
                    fast = loss(PairAttention.of_map(scored.maps[2][number], length), modality)
                    expected = naive.alignment(loss.name, maps[2], length, modality)
                    assert fast.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_of_a_half_match_the_twin(model: RetrievalModel, compute: ComputeSettings, seed: int) -> None:
    """A text with six images of random lengths, in chunks of random size: which are hard, the hinge, the gradient."""
    rng = np.random.default_rng(seed)
    pairs = torch.cartesian_prod(torch.arange(1), torch.arange(6))
    batch = random_batch(seed, pairs, rng.integers(1, 12, 1).tolist(), rng.integers(1, 10, 6).tolist())
    size = ChunkSize(10**6, int(rng.integers(3, 8)))
    model.zero_grad()
    terms = Objective(hard_neg_size=3, margin=0.9)(
        model, AnchorBatch("text", batch, 1), ComputeSettings(compute.precision, size)
    )
    terms.hinge.mean().backward()
    model.eval()

    weights = {name: tensor.double().requires_grad_() for name, tensor in model.state_dict().items()}
    scores = [naive.forward(weights, pair_of(batch, number), heads=3, layers=3)[0] for number in range(6)]
    hard = sorted(scores[1:], key=lambda score: score.item(), reverse=True)[:3]
    losses = [max(0.9 + score.sigmoid() - scores[0].sigmoid(), 0 * score) for score in hard]
    (sum(losses) / 3).backward()  # type: ignore[union-attr]
    assert terms.hinge[0].tolist() == pytest.approx([float(loss.detach()) for loss in losses], abs=1e-5)
    largest = max(float(weight.grad.abs().max()) for weight in weights.values() if weight.grad is not None)
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if expected is not None and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.double(), expected, atol=1e-4 * largest, rtol=1e-3)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_chunk_bounds_change_nothing(model: RetrievalModel, compute: ComputeSettings, difference: int) -> None:
    batch = random_batch(1, ALL)
    bounds = [ChunkSize(10**6, len(ALL) + difference), ChunkSize(10**6, 5), ChunkSize(1, 400), ChunkSize(500, 7)]
    with torch.no_grad():
        expected = torch.stack([model(batch.select(pair[None]), compute).scores[0] for pair in batch.pairs])
        for size in bounds:
            actual = model(batch, ComputeSettings(compute.precision, size)).scores
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_requesting_maps_changes_no_score(model: RetrievalModel, compute: ComputeSettings) -> None:
    batch = random_batch(3, ALL)
    with torch.no_grad():
        plain = model(batch, compute)
        requested = model(batch, compute, MapRequest([0, 5], [0, 1, 2]))
    assert torch.equal(plain.scores, requested.scores)
    assert not plain.maps
    assert sorted(requested.maps) == [0, 1, 2]


def test_every_pair_is_in_exactly_one_chunk_within_bounds() -> None:
    texts, images = torch.tensor(TEXT_LENGTHS) + 2, torch.tensor(IMAGE_LENGTHS)
    for size in (ChunkSize(300, 4), ChunkSize(64, 100), ChunkSize(1, 1)):
        cut = list(chunks(texts, images, ALL, size))
        assert sorted(torch.cat([chunk.members for chunk in cut]).tolist()) == list(range(len(ALL)))
        for chunk in cut:
            assert len(chunk.members) <= size.pairs
            assert chunk.rows.numel() <= size.tokens or len(chunk.members) == 1
            assert chunk.rows.shape[1] == int(chunk.lengths.max())


def test_micro_steps_together_give_the_same_gradient(model: RetrievalModel, compute: ComputeSettings) -> None:
    """Two groups in one pass, and one after the other."""
    together = random_batch(4, torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0], [3, 2], [0, 2], [1, 2], [4, 2]]))
    halves = [together.select(together.pairs[:4]), together.select(together.pairs[4:])]
    objective = Objective(hard_neg_size=2, margin=0.2, regulariser="distributed", layers=(0, 1))
    gradients = []
    for parts in ([AnchorBatch("image", together, 2)], [AnchorBatch("image", half, 1) for half in halves]):
        model.zero_grad()
        for half in parts:
            terms = objective(model, half, compute)
            (terms.hinge.mean(dim=1).sum() + terms.alignment.sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

"""How far the attentions of matched pairs are from agreement: the IAIS losses, measured and not trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import PairBatch
from data.loader import Loader
from data.tasks import PairSource, read_pairs
from evaluation.rounds import shared_out
from model.iais import MODALITIES, REGULARISERS, attention_blocks
from model.retrieval import Compute, RetrievalModel
from model.uniter import MapRequest
from utils.distributed import Workers
from utils.logger import progress_bar

PAIRS_PER_BLOCK = 32  # their maps are held together: heads × (words + regions)² numbers each


class PositiveTask(Dataset[PairBatch]):
    """The positive pairs of a source, ``PAIRS_PER_BLOCK`` at a time."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self.starts = range(0, len(source.text_db), PAIRS_PER_BLOCK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> PairBatch:
        source, first = self.source, self.starts[number]
        images = source.image_of[first : first + PAIRS_PER_BLOCK]
        ids = source.text_db.ids[first : first + PAIRS_PER_BLOCK]
        return read_pairs([(source, text_id, source.image_names[image]) for text_id, image in zip(ids, images, strict=True)])


@torch.no_grad()
def alignment_of_positives(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader, workers: Workers
) -> dict[str, dict[str, float]]:
    """The mean of each alignment loss over all positive pairs, in the last layer: {"singular": {"L": …, "V": …}, …}.

    Shared out among the workers; worker 0 has the result, the same to the bit for any number of them, the others zeros.
    """
    model.eval()
    last = model.config.num_hidden_layers - 1
    task = PositiveTask(source)

    def work(number: int, batch: PairBatch) -> np.ndarray:
        maps = model(batch, compute, MapRequest(range(len(batch.pairs)), [last])).maps[last]
        text_lengths = batch.tokens.lengths[batch.pairs[:, 0]].tolist()
        blocks = [attention_blocks(scores, length) for scores, length in zip(maps, text_lengths, strict=True)]
        losses = [regulariser(block, way) for regulariser in REGULARISERS.values() for way in MODALITIES for block in blocks]
        return torch.stack(losses).double().cpu().numpy().reshape(len(REGULARISERS), len(MODALITIES), -1).sum(axis=2)

    total = np.zeros((len(REGULARISERS), len(MODALITIES)))
    with progress_bar(workers.first, total=len(task), desc="alignment") as bar:
        for _, sums in shared_out(workers, loader, task, range(len(task)), work):
            total += sums
            bar.update()
    means = total / len(source.text_db)
    return {kind: dict(zip(MODALITIES, row.tolist(), strict=True)) for kind, row in zip(REGULARISERS, means, strict=True)}

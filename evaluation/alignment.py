"""How far the attentions of matched pairs are from agreement: the IAIS losses, measured and not trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import PairBatch
from data.loader import Loader
from data.split import RetrievalSplit, read_pairs
from evaluation.rounds import shared_out
from model.iais import MODALITIES, REGULARISERS, PairAttention
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import MapRequest
from utils.distributed import ProcessGroup
from utils.logging import progress_bar

PAIRS_PER_BLOCK = 32  # their maps are held together: heads × (words + regions)² numbers each


class PositivePairs(Dataset[PairBatch]):
    """The positive pairs of a source, ``PAIRS_PER_BLOCK`` at a time."""

    def __init__(self, source: RetrievalSplit) -> None:
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
    model: RetrievalModel, source: RetrievalSplit, compute: ComputeSettings, loader: Loader, group: ProcessGroup
) -> dict[str, dict[str, float]]:
    """The mean of each alignment loss over all positive pairs, in the last layer: {"singular": {"L": …, "V": …}, …}.

    Shared out among the workers; worker 0 has the result, the same to the bit for any number of them, the others zeros.
    """
    model.eval()
    last = model.config.num_hidden_layers - 1
    task = PositivePairs(source)

    def work(number: int, batch: PairBatch) -> np.ndarray:
        maps = model(batch, compute, MapRequest(range(len(batch.pairs)), [last])).maps[last]
        text_lengths = batch.tokens.lengths[batch.pairs[:, 0]].tolist()
        pairs = [PairAttention.of_map(scores, length, last) for scores, length in zip(maps, text_lengths, strict=True)]
        losses = [loss(pair, modality) for loss in REGULARISERS.values() for modality in MODALITIES for pair in pairs]
        return torch.stack(losses).double().cpu().numpy().reshape(len(REGULARISERS), len(MODALITIES), -1).sum(axis=2)

    total = np.zeros((len(REGULARISERS), len(MODALITIES)))
    with progress_bar(group.is_main, total=len(task), desc="alignment") as bar:
        for _, sums in shared_out(group, loader, task, range(len(task)), work):
            total += sums
            bar.update()
    means = total / len(source.text_db)
    return {kind: dict(zip(MODALITIES, row.tolist(), strict=True)) for kind, row in zip(REGULARISERS, means, strict=True)}

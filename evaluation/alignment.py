"""How far the attentions of matched pairs are from agreement: the IAIS losses, measured and not trained on."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from data.batch import PairBatch
from data.loader import Loader
from data.tasks import PairSource, read_pairs
from model.iais import REGULARISERS, alignment_loss
from model.retrieval import Compute, RetrievalModel
from model.uniter import MapRequest


class PositiveTask(Dataset[PairBatch]):
    """The positive pairs of a source, ``size`` at a time."""

    def __init__(self, source: PairSource, size: int) -> None:
        self.source = source
        self.starts = range(0, len(source.text_db), size)
        self.size = size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> PairBatch:
        ids = self.source.text_db.ids[self.starts[number] :][: self.size]
        return read_pairs([(self.source, text_id, self.source.text_db.image_of[text_id]) for text_id in ids])


@torch.no_grad()
def alignment_of_positives(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader
) -> dict[str, dict[str, float]]:
    """The mean of each alignment loss over all positive pairs, in the last layer: {"singular": {"L": …, "V": …}, …}."""
    model.eval()
    last = model.config.num_hidden_layers - 1
    sums = {kind: {"L": 0.0, "V": 0.0} for kind in REGULARISERS}
    for batch in loader(PositiveTask(source, compute.chunk.pairs)):
        maps = model(batch, compute, MapRequest(range(len(batch.pairs)), [last])).maps[last]
        for text_length, scores in zip(batch.tokens.lengths[batch.pairs[:, 0]].tolist(), maps, strict=True):
            for kind, regulariser in REGULARISERS.items():
                sums[kind]["L"] += float(alignment_loss(regulariser, [scores], text_length, "L"))
                sums[kind]["V"] += float(alignment_loss(regulariser, [scores], text_length, "V"))
    return {kind: {way: value / len(source.text_db) for way, value in by_way.items()} for kind, by_way in sums.items()}

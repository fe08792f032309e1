"""How far the attentions of matched pairs are from agreement: the IAIS losses, measured and not trained on."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data.batch import PairBatch
from data.loader import Loader
from data.tasks import PairSource, read_pairs
from model.iais import REGULARISERS, attention_blocks
from model.retrieval import Compute, RetrievalModel
from model.uniter import MapRequest

PAIRS_PER_BLOCK = 32  # their maps are held together: heads × (words + regions)² numbers each


class PositiveTask(Dataset[PairBatch]):
    """The positive pairs of a source, ``PAIRS_PER_BLOCK`` at a time."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self.starts = range(0, len(source.text_db), PAIRS_PER_BLOCK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> PairBatch:
        ids = self.source.text_db.ids[self.starts[number] :][:PAIRS_PER_BLOCK]
        return read_pairs([(self.source, text_id, self.source.text_db.image_of[text_id]) for text_id in ids])


@torch.no_grad()
def alignment_of_positives(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader
) -> dict[str, dict[str, float]]:
    """The mean of each alignment loss over all positive pairs, in the last layer: {"singular": {"L": …, "V": …}, …}."""
    model.eval()
    last = model.config.num_hidden_layers - 1
    task = PositiveTask(source)
    sums = {kind: torch.zeros(2, dtype=torch.float64) for kind in REGULARISERS}
    for batch in tqdm(loader(task), total=len(task), desc="alignment", dynamic_ncols=True):
        maps = model(batch, compute, MapRequest(range(len(batch.pairs)), [last])).maps[last]
        text_lengths = batch.tokens.lengths[batch.pairs[:, 0]].tolist()
        blocks = [attention_blocks(scores, length) for scores, length in zip(maps, text_lengths, strict=True)]
        for kind, regulariser in REGULARISERS.items():
            losses = torch.stack([torch.stack([regulariser(block, "L"), regulariser(block, "V")]) for block in blocks])
            sums[kind] += losses.sum(dim=0).double().cpu()
    return {kind: dict(zip("LV", (total / len(source.text_db)).tolist(), strict=True)) for kind, total in sums.items()}

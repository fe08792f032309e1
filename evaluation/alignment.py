"""Measure, without training on them, the alignment losses of all positive pairs of a split."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batch import PairBatch
from data.loader import Loader
from data.split import RetrievalSplit, read_pairs
from evaluation.scoring import map_over_ranks
from evaluation.tables import aligned
from model.iais import MODALITIES, REGULARISERS, Modality, PairAttention
from model.retrieval import ComputeSettings, RetrievalModel
from model.uniter import MapRequest
from utils.distributed import ProcessGroup
from utils.errors import InputError
from utils.logging import progress_bar

PAIRS_PER_BLOCK = 32  # their maps are held together, heads × (words + regions)² numbers per pair


class PositivePairs(Dataset[PairBatch]):
    """The positive pairs of a split in batches of ``PAIRS_PER_BLOCK``."""

    def __init__(self, split: RetrievalSplit) -> None:
        self.split = split
        self.starts = range(0, len(split.text_db), PAIRS_PER_BLOCK)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> PairBatch:
        split, block = self.split, slice(self.starts[number], self.starts[number] + PAIRS_PER_BLOCK)
        pairs = zip(split.text_db.ids[block], split.image_of[block], strict=True)
        return read_pairs([(split, text_id, split.image_names[image]) for text_id, image in pairs])


@torch.no_grad()
def check_regularisers(heads: int) -> dict[str, str]:
    """Try every regulariser; return a checksum of the source of each. Raises ``InputError`` as ``Regulariser.check`` does."""
    checksums = {}
    for name, loss in REGULARISERS.items():
        loss.check(heads)
        try:
            source = inspect.getsource(loss.function)
        except (OSError, TypeError):  # made by exec, or not written in Python
            source = ""
        checksums[f"regulariser {name}"] = hashlib.sha256(source.encode()).hexdigest()
    return checksums


@torch.no_grad()
def alignment_of_positives(
    model: RetrievalModel, split: RetrievalSplit, compute: ComputeSettings, loader: Loader, group: ProcessGroup
) -> dict[str, dict[Modality, float]]:
    """Return the mean of each alignment loss over all positive pairs, in the last layer: {"singular": {"L": …, "V": …}, …}.

    Collective; bitwise the same on rank 0 for any number of ranks, zeros on the others. Raises ``InputError`` if a loss is not
    finite.
    """
    model.eval()
    last = model.config.num_hidden_layers - 1
    batches = PositivePairs(split)

    def measure(number: int, batch: PairBatch) -> np.ndarray:
        maps = model(batch, compute, MapRequest(range(len(batch.pairs)), [last])).maps[last]
        text_lengths = batch.tokens.lengths[batch.pairs[:, 0]].tolist()
        pairs = [PairAttention.of_map(scores, length, last) for scores, length in zip(maps, text_lengths, strict=True)]
        losses = [loss(pair, modality) for loss in REGULARISERS.values() for modality in MODALITIES for pair in pairs]
        values = torch.stack(losses).double().cpu().numpy().reshape(len(REGULARISERS), len(MODALITIES), -1)
        for loss, _, pair in np.argwhere(~np.isfinite(values))[:1]:
            text, image = batch.pairs[pair].tolist()
            named = f"text {batch.text_ids[text]!r} and image {batch.image_names[image]!r}"
            raise InputError(f"the alignment loss {[*REGULARISERS][loss]} of {named} is not finite; correct the regulariser")
        return values.sum(axis=2)

    total = np.zeros((len(REGULARISERS), len(MODALITIES)))
    with progress_bar(group.is_main, total=len(batches), desc="alignment") as bar:
        for _, sums in map_over_ranks(group, loader, batches, range(len(batches)), measure):
            total += sums
            bar.update()
    means = total / len(split.text_db)
    return {name: dict(zip(MODALITIES, row.tolist(), strict=True)) for name, row in zip(REGULARISERS, means, strict=True)}


def alignment_table(losses: Mapping[str, Mapping[Modality, float]]) -> str:
    """Format the losses of regularisers for words and for regions, one per line."""
    rows = ([name, f"{by_modality['L']:.4g}", f"{by_modality['V']:.4g}"] for name, by_modality in losses.items())
    return aligned([["alignment loss", "words", "regions"], *rows])

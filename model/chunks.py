"""How pairs become the padded chunks an encoder runs on: grouped by length, so that little is padded.

Shapes: P pairs, B pairs of a chunk, N longest joined length in the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkSize:
    """Upper bounds on a chunk: tokens, padding included; pairs; and padding, of which more is dearer than another chunk."""

    tokens: int = 2048
    pairs: int = 400
    padding: int = 64

    @classmethod
    def for_device(cls, device: torch.device, widest: int, pairs: int) -> ChunkSize:
        """So many tokens that activations ``widest`` numbers wide fit a CPU's caches or fill a GPU (docs/performance.md)."""
        tokens = max(1, (3 << 20 if device.type == "cpu" else 96 << 20) // widest)
        return cls(tokens=tokens, pairs=pairs, padding=tokens // 16)


@dataclass(frozen=True)
class Chunk:
    """Some pairs of a batch, joined.

    Attributes:
        members: (B,) which pairs these are.
        lengths: (B,) joined lengths, words then regions.
        rows: (B, N) rows of the table [texts; images]; a padded place repeats row 0 and is masked.
        mask: (B, 1, 1, N) true at real places, or None where nothing is padded.
    """

    members: Tensor
    lengths: Tensor
    rows: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> Chunk:
        """The chunk with what the encoder computes on, ``rows`` and ``mask``, on ``device``."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return replace(self, rows=self.rows.to(device, non_blocking=True), mask=mask)


def chunks(text_lengths: Tensor, image_lengths: Tensor, pairs: Tensor, size: ChunkSize) -> Iterator[Chunk]:
    """Cut ``pairs`` (P, 2) into chunks of like length; each pair is in exactly one. All tensors are on the CPU."""
    text_starts = text_lengths.cumsum(0) - text_lengths
    image_starts = text_lengths.sum() + image_lengths.cumsum(0) - image_lengths
    texts, images = pairs.unbind(1)
    lengths = text_lengths[texts] + image_lengths[images]  # (P,)
    order = lengths.argsort(descending=True, stable=True)
    until = lengths[order].cumsum(0)  # (P,)
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        most = max(1, min(size.pairs, size.tokens // longest))
        padding = longest * torch.arange(1, most + 1)[: len(order) - first] - (
            until[first : first + most] - until[first] + longest
        )
        count = int((padding <= size.padding).sum())  # it grows with every pair
        members = order[first : first + count]
        words = text_lengths[texts[members], None]  # (B, 1)
        place = torch.arange(longest).expand(len(members), longest)  # (B, N)
        rows = torch.where(
            place < words, text_starts[texts[members], None] + place, image_starts[images[members], None] + place - words
        )
        real = place < lengths[members, None]
        yield Chunk(members, lengths[members], rows * real, None if bool(real.all()) else real[:, None, None])
        first += count

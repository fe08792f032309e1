"""Cut pairs into the padded chunks that the encoder runs on, grouped by length so that little is padded.

Shapes: P pairs, B pairs of a chunk, N longest joined length in the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkSize:
    """Upper bounds on a chunk; they change results by rounding alone.

    Attributes:
        tokens: tokens, padding included.
        pairs: pairs.
        padding: padding tokens; beyond this, starting a new chunk is cheaper.
    """

    tokens: int = 2048
    pairs: int = 400
    padding: int = 64

    @classmethod
    def for_device(cls, device: torch.device, widest: int, pairs: int) -> ChunkSize:
        """Bounds for activations ``widest`` numbers wide that fit a CPU's caches or fill a GPU (docs/performance.md)."""
        tokens = max(1, (3 << 20 if device.type == "cpu" else 96 << 20) // widest)
        return cls(tokens=tokens, pairs=pairs, padding=tokens // 16)


@dataclass(frozen=True)
class Chunk:
    """Some pairs of a batch, joined.

    Attributes:
        members: (B,) indices of the pairs.
        lengths: (B,) joined lengths, words then regions.
        rows: (B, N) indices into the table [texts; images]; padding repeats row 0 and is masked.
        mask: (B, 1, 1, N) true at real positions; None without padding.
    """

    members: Tensor
    lengths: Tensor
    rows: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> Chunk:
        """The chunk with ``rows`` and ``mask``, which the encoder computes on, on ``device``."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return replace(self, rows=self.rows.to(device, non_blocking=True), mask=mask)


def chunks(text_lengths: Tensor, image_lengths: Tensor, pairs: Tensor, size: ChunkSize) -> Iterator[Chunk]:
    """Cut ``pairs`` (P, 2) into chunks of similar length; each pair is in exactly one. All tensors are on the CPU."""
    text_starts = text_lengths.cumsum(0) - text_lengths
    image_starts = text_lengths.sum() + image_lengths.cumsum(0) - image_lengths
    texts, images = pairs.unbind(1)
    lengths = text_lengths[texts] + image_lengths[images]  # (P,)
    order = lengths.argsort(descending=True, stable=True)
    cumulative = lengths[order].cumsum(0)  # (P,)
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        limit = max(1, min(size.pairs, size.tokens // longest))
        real_tokens = cumulative[first : first + limit] - cumulative[first] + longest  # of the first 1, 2, … pairs
        padding = longest * torch.arange(1, len(real_tokens) + 1) - real_tokens  # never decreases
        count = int((padding <= size.padding).sum())
        members = order[first : first + count]
        words = text_lengths[texts[members], None]  # (B, 1)
        position = torch.arange(longest).expand(count, longest)  # (B, N)
        text_rows = text_starts[texts[members], None] + position
        image_rows = image_starts[images[members], None] + position - words
        rows = torch.where(position < words, text_rows, image_rows)
        real = position < lengths[members, None]
        yield Chunk(members, lengths[members], rows * real, None if bool(real.all()) else real[:, None, None])
        first += count

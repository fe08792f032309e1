"""The architecture of a UNITER encoder, read from its JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.batch import InputLimits
from utils.errors import InputError, counted
from utils.options import read_json_as


@dataclass(frozen=True)
class UniterConfig:
    """Sizes of a UNITER encoder (Chen et al. 2020, section 3.1); names are those of the published ``uniter-*.json`` files.

    ``img_dim`` is the width of a region feature, 2048 for bottom-up attention.

    Raises:
        InputError: a size is not positive, a probability is outside [0, 1), or the heads do not divide the width.
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    img_dim: int = 2048

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not 1 <= value < 2**31:
                raise InputError(f"{name} is {value}, expected a positive 32-bit integer")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a probability in [0, 1)")
        if self.type_vocab_size < 2:
            raise InputError(
                f"type_vocab_size is {self.type_vocab_size}, expected at least 2: words are type 0, regions type 1"
            )
        if not 0 < self.initializer_range < math.inf:
            raise InputError(f"initializer_range is {self.initializer_range}, expected a positive standard deviation")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> UniterConfig:
        """Read an architecture file. Raises ``InputError`` that names the file and the unknown key or impossible value."""
        return read_json_as(cls, path)

    def with_dropout(self, probability: float) -> UniterConfig:
        """The same architecture with one dropout probability everywhere."""
        return replace(self, hidden_dropout_prob=probability, attention_probs_dropout_prob=probability)

    def layer_numbers(self, layers: Iterable[int | str], option: str) -> tuple[int, ...]:
        """Resolve layers counted from the first (0 …) or the last (-1 …), or ``"all"``, to ascending numbers from the first.

        Raises:
            InputError: the encoder has no such layer; the message names ``option``.
        """
        count = self.num_hidden_layers
        numbers: set[int] = set()
        for layer in layers:
            if layer == "all":
                numbers |= set(range(count))
            elif isinstance(layer, int) and -count <= layer < count:
                numbers.add(layer % count)
            else:
                raise InputError(
                    f"{option} names layer {layer}, expected -{count} to {count - 1}: the encoder has {counted(count, 'layer')}"
                )
        return tuple(sorted(numbers))

    @property
    def input_limits(self) -> InputLimits:
        """The limits that data must respect."""
        return InputLimits(self.vocab_size, self.max_position_embeddings, self.img_dim)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``from_json`` reads."""
        return asdict(self)

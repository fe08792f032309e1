"""A naive twin of the method, straight from its equations: one pair at a time, loops, double precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Pair:
    """``tokens`` with [CLS] and [SEP]; ``features`` (K, F); ``boxes`` (K, 7)."""

    tokens: list[int]
    features: np.ndarray
    boxes: np.ndarray


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return (x - mean) / torch.sqrt(variance + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def forward(weights: dict[str, Tensor], pair: Pair, heads: int, layers: int) -> tuple[Tensor, list[list[Tensor]]]:
    """The raw score, and for each layer and head S = Q Kᵀ / √d of the whole sequence."""
    types = weights["uniter.embeddings.token_type_embeddings.weight"]
    rows = []
    for position, token in enumerate(pair.tokens):
        word = weights["uniter.embeddings.word_embeddings.weight"][token]
        place = weights["uniter.embeddings.position_embeddings.weight"][position]
        rows.append(layer_norm(word + place + types[0], weights, "uniter.embeddings.LayerNorm"))
    image = "uniter.img_embeddings"
    for feature, box in zip(pair.features, pair.boxes, strict=True):
        feature, box = torch.tensor(feature, dtype=torch.float64), torch.tensor(box, dtype=torch.float64)
        look = layer_norm(linear(feature, weights, f"{image}.img_linear"), weights, f"{image}.img_layer_norm")
        where = layer_norm(linear(box, weights, f"{image}.pos_linear"), weights, f"{image}.pos_layer_norm")
        rows.append(layer_norm(look + where + types[1], weights, f"{image}.LayerNorm"))
    maps = []
    for number in range(layers):
        layer = f"uniter.encoder.layer.{number}"
        query, key, value = (
            [linear(row, weights, f"{layer}.attention.self.{p}") for row in rows] for p in ("query", "key", "value")
        )
        width = len(rows[0]) // heads
        of_heads, context = [], [[] for _ in rows]
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([torch.stack([q[part] @ k[part] / math.sqrt(width) for k in key]) for q in query])
            of_heads.append(scores)
            for i in range(len(rows)):
                attention = scores[i].exp() / scores[i].exp().sum()
                context[i].append(sum(a * v[part] for a, v in zip(attention, value, strict=True)))
        maps.append(of_heads)
        for i, row in enumerate(rows):
            attended = linear(torch.cat(context[i]), weights, f"{layer}.attention.output.dense")
            attended = layer_norm(row + attended, weights, f"{layer}.attention.output.LayerNorm")
            wide = linear(attended, weights, f"{layer}.intermediate.dense")
            wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
            narrow = linear(wide, weights, f"{layer}.output.dense")
            rows[i] = layer_norm(attended + narrow, weights, f"{layer}.output.LayerNorm")
    pooled = torch.tanh(linear(rows[0], weights, "uniter.pooler.dense"))
    return linear(pooled, weights, "rank_output")[0], maps


def blocks(maps: list[Tensor], text_length: int) -> dict[str, Tensor]:
    """A_LL, A_VV, A_LV and A_VL from the maps of one layer's heads."""
    length = len(maps[0])
    places = {"L": range(1, text_length - 1), "V": range(text_length, length)}
    result = {}
    for rows in "LV":
        for columns in "LV":
            block = torch.zeros(len(places[rows]), len(places[columns]), dtype=torch.float64)
            for scores in maps:
                for a, i in enumerate(places[rows]):
                    total = sum(scores[i, j].exp() for j in places[columns])
                    for b, j in enumerate(places[columns]):
                        block[a, b] += scores[i, j].exp() / total / len(maps)
            result[rows + columns] = block
    return result


def kl(q: Tensor, p: Tensor, epsilon: float = 0.0) -> float:
    return float(sum(a * (math.log(a) - math.log(b + epsilon)) for a, b in zip(q.tolist(), p.tolist(), strict=True)))


def softmax(row: Tensor) -> Tensor:
    return row.exp() / row.exp().sum()


def symmetric(ours: Tensor, theirs: Tensor, epsilon: float = 0.0) -> float:
    """The mean over rows of KL in both directions."""
    return sum(kl(a, b, epsilon) + kl(b, a, epsilon) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def singular(intra: Tensor, cross: Tensor, cross_back: Tensor, other: Tensor) -> float:
    nearest = [int(row.argmax()) for row in cross]
    chosen = [torch.tensor([float(other[i, j]) for j in nearest], dtype=torch.float64) for i in nearest]
    return symmetric(torch.stack([softmax(row) for row in chosen]), intra)


def distributed(intra: Tensor, cross: Tensor, cross_back: Tensor, other: Tensor) -> float:
    return symmetric(cross @ cross_back, intra, epsilon=1e-6)


def cacr(intra: Tensor, cross: Tensor, cross_back: Tensor, other: Tensor) -> float:
    congruent = torch.einsum("ia,ab,jb->ij", cross, other, cross)
    return symmetric(torch.stack([softmax(row) for row in intra]), torch.stack([softmax(row) for row in congruent]))


ALIGNMENTS = {"singular": singular, "distributed": distributed, "cacr": cacr}


def alignment(kind: str, maps: list[Tensor], text_length: int, modality: str) -> float:
    """The alignment loss of one pair in one layer."""
    cut = blocks(maps, text_length)
    own, other = ("L", "V") if modality == "L" else ("V", "L")
    return ALIGNMENTS[kind](cut[own + own], cut[own + other], cut[other + own], cut[other + other])

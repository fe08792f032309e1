"""Read and write weights: published UNITER checkpoints, pretrained or fine-tuned, and our own, which have the same names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.retrieval import RetrievalModel
from utils.errors import InputError
from utils.files import replacing


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held.

    Attributes:
        head: where the ranking head came from; ``"random"`` when the file has none.
        unused: tensors of the file that retrieval does not need.
    """

    path: Path
    head: Literal["rank_output", "itm_output", "random"]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        heads = {
            "rank_output": "the file's own rank_output",
            "itm_output": 'row 1 ("match") of the pretrained itm_output',
            "random": "random weights: the file has neither rank_output nor itm_output",
        }
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.path}: ranking head from {heads[self.head]}{unused}"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file, in torch's present or pre-1.6 container, without running pickled code.

    Raises:
        InputError: the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever a damaged pickle makes it raise
        raise InputError(f"{path}: not a readable checkpoint of tensors ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: expected a state dict, names to tensors")
    return {_modern_name(name): tensor for name, tensor in state.items()}


def save_checkpoint(path: str | Path, model: RetrievalModel) -> None:
    """Write the weights under their published names, atomically."""
    with replacing(path) as file:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, file)


def load_checkpoint(model: RetrievalModel, path: str | Path) -> LoadReport:
    """Copy a checkpoint's weights into ``model``.

    A file's own ``rank_output`` is kept; without one the head becomes row 1 of ``itm_output``, or stays as it is.

    Raises:
        InputError: a tensor that the encoder needs is missing or has another shape.
    """
    state = read_state_dict(path)
    needed = model.state_dict()
    head: Literal["rank_output", "itm_output", "random"] = "rank_output"
    if "rank_output.weight" not in state or "rank_output.bias" not in state:
        head = "itm_output" if "itm_output.weight" in state and "itm_output.bias" in state else "random"
        for part in ("weight", "bias"):
            name = f"rank_output.{part}"
            state[name] = state[f"itm_output.{part}"][1:2] if head == "itm_output" else needed[name]
    for name, tensor in needed.items():
        if name not in state:
            raise InputError(f"{path}: {name} is missing, expected a tensor of shape {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            vocabulary = ": the checkpoint has another vocabulary" if "word_embeddings" in name else ""
            raise InputError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)} by model_config{vocabulary}"
            )
    model.load_state_dict({name: state[name] for name in needed})
    used = {"itm_output.weight", "itm_output.bias"} if head == "itm_output" else set()
    return LoadReport(Path(path), head, tuple(sorted(set(state) - set(needed) - used)))


def _modern_name(name: str) -> str:
    """The name a parameter has today; checkpoints of 2018 say gamma and beta for a LayerNorm's weight and bias."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name

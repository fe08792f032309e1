"""Read and write weights: published UNITER checkpoints, pretrained or fine-tuned, and our own, which use the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from model.config import UniterConfig
from model.retrieval import RetrievalModel
from utils.errors import InputError, counted
from utils.tensors import load_tensors, save_tensors

Head = Literal["rank_output", "itm_output", "random"]
_HEAD_ORIGINS = {
    "rank_output": "its own rank_output",
    "itm_output": 'row 1 ("match") of its pretrained itm_output',
    "random": "random weights, as it has neither rank_output nor itm_output",
}


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a checkpoint.

    Attributes:
        head: where the ranking head came from; ``"random"`` if the file has none.
        unused: names of the tensors that retrieval does not need.
    """

    path: Path
    head: Head
    unused: tuple[str, ...]

    def __str__(self) -> str:
        unused = f"; unused: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.path}: ranking head from {_HEAD_ORIGINS[self.head]}{unused}"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a ``.pt`` file, in torch's current or pre-1.6 container, without running pickled code.

    Raises:
        InputError: the file is missing, damaged, or holds anything but named tensors.
    """
    state = load_tensors(path)
    if isinstance(state, dict) and {"model", "optimiser"} <= state.keys():
        best = Path(path).with_name("model_best.pt")
        raise InputError(f"{path}: a training state, for --resume; expected weights, such as {best}, the best in validation")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: not a state dict; expected a file that maps parameter names to tensors")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _current_name(name) in renamed:
            raise InputError(f"{path}: holds {_current_name(name)} twice, under its old and its current name; remove one")
        renamed[_current_name(name)] = tensor
    return renamed


def save_checkpoint(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Write a model's state dict under its published names, atomically."""
    save_tensors(path, {name: tensor.cpu() for name, tensor in weights.items()})


def load_checkpoint(model: RetrievalModel, path: str | Path) -> LoadReport:
    """Copy the weights of a checkpoint into ``model``.

    A file's own ``rank_output`` is used; without one the head becomes row 1 of ``itm_output``, or stays as initialised.

    Raises:
        InputError: a tensor that the encoder needs is missing or has another shape.
    """
    state = read_state_dict(path)
    needed = model.state_dict()
    head = _add_head(state, needed, path)
    for name, tensor in needed.items():
        if name not in state:
            raise InputError(f"{path}: {name} is missing; expected a tensor of shape {tuple(tensor.shape)}")
        _check_shape(state, name, tensor.shape, path)
        if not state[name].is_floating_point():
            raise InputError(f"{path}: {name} has type {state[name].dtype}; expected a floating-point tensor")
    extra = next((name for name in state if name.startswith("uniter.encoder.layer.") and name not in needed), None)
    if extra is not None:
        layers = model.config.num_hidden_layers
        raise InputError(f"{path}: holds {extra}, but model_config has {counted(layers, 'layer')}; give its own model_config")
    model.load_state_dict({name: state[name] for name in needed})
    used = {"itm_output.weight", "itm_output.bias"} if head == "itm_output" else set()
    return LoadReport(Path(path), head, tuple(sorted(set(state) - set(needed) - used)))


def load_ranking_model(path: str | Path, config: UniterConfig) -> tuple[RetrievalModel, LoadReport]:
    """Load the model of a checkpoint on the CPU.

    Raises:
        InputError: as ``load_checkpoint``, or the checkpoint has no ranking head.
    """
    model = RetrievalModel(config)
    report = load_checkpoint(model, path)
    if report.head == "random":
        raise InputError(f"{path}: holds neither rank_output nor itm_output; expected a checkpoint with a ranking head")
    return model, report


def _add_head(state: dict[str, Tensor], needed: dict[str, Tensor], path: str | Path) -> Head:
    """Add a ranking head to ``state`` if it has none, and return where the head comes from."""
    parts = ("weight", "bias")
    for head in ("rank_output", "itm_output"):
        present = [part for part in parts if f"{head}.{part}" in state]
        if len(present) == 1:
            raise InputError(f"{path}: {head} has only a {present[0]}; expected weight and bias")
    if "rank_output.weight" in state:
        return "rank_output"
    pretrained = "itm_output.weight" in state
    for part in parts:
        own = needed[f"rank_output.{part}"]
        if pretrained:
            _check_shape(state, f"itm_output.{part}", (2, *own.shape[1:]), path)
        state[f"rank_output.{part}"] = state[f"itm_output.{part}"][1:2] if pretrained else own
    return "itm_output" if pretrained else "random"


def _check_shape(state: dict[str, Tensor], name: str, expected: tuple[int, ...], path: str | Path) -> None:
    shape = tuple(state[name].shape)
    if shape != tuple(expected):
        vocabulary = "; the checkpoint has another vocabulary" if "word_emb" in name and shape[:1] != expected[:1] else ""
        raise InputError(f"{path}: {name} has shape {shape}, model_config expects {tuple(expected)}{vocabulary}")


def _current_name(name: str) -> str:
    """The current name of a parameter: checkpoints of 2018 say gamma and beta for the weight and bias of a LayerNorm."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name

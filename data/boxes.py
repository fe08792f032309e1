"""Which boxes of an image are kept, and the folder and file names that encode this (see docs/formats.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from utils.errors import InputError
from utils.options import option


@dataclass(frozen=True)
class BoxRule:
    """How many boxes per image are kept: clamp(#(conf > conf_th), min_bb, max_bb), or ``num_bb`` if ``conf_th`` is -1."""

    conf_th: float = option(0.2, "keep boxes of higher confidence; -1 for a database of exactly num_bb boxes per image")
    max_bb: int = option(100, "maximum number of boxes per image")
    min_bb: int = option(10, "minimum number of boxes per image")
    num_bb: int = option(36, "number of boxes per image if conf_th is -1")

    def __post_init__(self) -> None:
        if not (self.conf_th == -1 or 0 <= self.conf_th <= 1):
            raise InputError(f"conf_th {self.conf_th}: expected a confidence from 0 to 1, or -1 for num_bb boxes per image")
        if not 1 <= self.min_bb <= self.max_bb:
            raise InputError(f"min_bb {self.min_bb} and max_bb {self.max_bb}: expected 1 <= min_bb <= max_bb")
        if self.num_bb < 1:
            raise InputError(f"num_bb {self.num_bb}: expected at least 1")

    @property
    def fixed(self) -> bool:
        """Whether every image keeps ``num_bb`` boxes."""
        return self.conf_th == -1

    @property
    def suffix(self) -> str:
        """``th0.2_max100_min10``, as in the names of published databases."""
        return f"th{float(self.conf_th) + 0.0}_max{self.max_bb}_min{self.min_bb}"

    @property
    def folder(self) -> str:
        """Name of the LMDB folder, without ``_compressed``."""
        return f"feat_numbb{self.num_bb}" if self.fixed else f"feat_{self.suffix}"

    def count(self, conf: np.ndarray) -> int:
        """Return the number of boxes to keep of those with confidences ``conf`` [K], compared in their own precision."""
        wanted = self.num_bb if self.fixed else min(max(int((conf > float(self.conf_th)).sum()), self.min_bb), self.max_bb)
        return min(wanted, len(conf))


PUBLISHED_RULE = BoxRule()


@dataclass(frozen=True, kw_only=True)
class ImageOptions(BoxRule):
    """The options that select an image database and its boxes."""

    compressed_db: bool = option(False, "read the database with compressed records (*_compressed)")

    @property
    def box_rule(self) -> BoxRule:
        """The rule alone."""
        return BoxRule(self.conf_th, self.max_bb, self.min_bb, self.num_bb)


@dataclass(frozen=True)
class Layout:
    """What the name of an LMDB folder says about its records; ``rule`` None is that of ``all``, which has every box."""

    rule: BoxRule | None
    compressed: bool

    @property
    def folder(self) -> str:
        """Name of the LMDB folder."""
        return ("all" if self.rule is None else self.rule.folder) + ("_compressed" if self.compressed else "")

    @property
    def sidecar(self) -> str:
        """Name of the JSON of box counts beside the folder; "" if every image has the same number."""
        if self.rule is None:
            return "nbb.json"
        return "" if self.rule.fixed else f"nbb_{self.rule.suffix}.json"

    @property
    def options(self) -> str:
        """Options of a program that reads the database."""
        rule, flag = self.rule or PUBLISHED_RULE, "--compressed_db" if self.compressed else "--no-compressed_db"
        boxes = f"--num_bb {rule.num_bb}" if rule.fixed else f"--max_bb {rule.max_bb} --min_bb {rule.min_bb}"
        return f"--conf_th {rule.conf_th:g} {boxes} {flag}"

    def describe(self) -> str:
        """Return which boxes the database has, and the format of its records."""
        rule, records = self.rule, "as compressed .npz" if self.compressed else "as msgpack"
        if rule is None:
            return f"every box, {records}"
        if rule.fixed:
            return f"the {rule.num_bb} most confident boxes, {records}"
        return f"boxes of confidence over {rule.conf_th:g}, {rule.min_bb} to {rule.max_bb} per image, {records}"


def parse_layout(name: str) -> Layout:
    """Return the layout of an LMDB folder of this name, the inverse of ``Layout.folder``; ``InputError`` for any other name."""
    stem, rule = name.removesuffix("_compressed"), None
    if fixed := re.fullmatch(r"feat_numbb(\d+)", stem):
        rule = BoxRule(conf_th=-1, num_bb=int(fixed[1]))
    elif filtered := re.fullmatch(r"feat_th(\d+(?:\.\d+)?(?:e-\d+)?)_max(\d+)_min(\d+)", stem):
        rule = BoxRule(float(filtered[1]), int(filtered[2]), int(filtered[3]))
    layout = Layout(rule, stem != name)
    if layout.folder != name:
        expected = f"expected one like {PUBLISHED_RULE.folder}, feat_numbb36 or all"
        raise InputError(f"{name}: not the name of an image database, {expected}")
    return layout

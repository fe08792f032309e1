"""What all figures share: one style, text that is drawn verbatim, and writing the file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from unicodedata import category

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.style import context

from utils.errors import InputError
from utils.files import atomic_file

DPI = 150
MAX_PIXELS = 30_000  # per side; matplotlib refuses 65,536
FORMATS = (".png", ".svg")
# Fallbacks in this order for characters that the font before lacks; only the first must be installed.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
    *("Noto Emoji", "Symbola"),
)


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures in this context: our style and the fonts that are installed."""
    installed = set(fontManager.get_font_names())
    fonts = {"font.family": [name for name in _FONTS if name in installed]}
    with context(Path(__file__).with_name("iais.mplstyle")), rc_context(fonts):
        yield


def printable(text: str) -> str:
    """Return ``text`` with U+FFFD for what fonts and XML lack: control characters and halves of surrogate pairs."""
    return "".join("\ufffd" if category(letter) in ("Cc", "Cs") or letter in "\ufffe\uffff" else letter for letter in text)


def shorten(text: str, letters: int) -> str:
    """Return ``text``, cut to at most ``letters`` letters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def short_names(paths: Sequence[str]) -> list[str]:
    """Return ``paths`` without the folders that all of them begin and end with. Raises ``InputError`` for equal paths."""
    parts = [Path(path).absolute().parts for path in paths]
    for number, path in enumerate(paths):
        if parts[number] in parts[:number]:
            raise InputError(f"{path} is given twice, expected different paths to compare")
    start = _common(parts)
    end = _common([own[start:][::-1] for own in parts])
    names = ["/".join(own[start : len(own) - end]) for own in parts]
    return names if all(names) else list(paths)


def _common(sequences: Sequence[Sequence[str]]) -> int:
    """The number of items with which all sequences begin."""
    return len(list(takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))))


def check_format(path: str | Path) -> None:
    """Raise ``InputError`` unless the suffix names a format that figures can be written in."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"{path}: expected a file name that ends in {' or '.join(FORMATS)}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of ``path``, atomically. The same figure gives the same bytes.

    Raises ``InputError`` if the suffix is another one or the file cannot be written.
    """
    check_format(path)
    suffix = Path(path).suffix.lower()
    dpi = min(DPI, MAX_PIXELS / figure.get_size_inches().max())
    with style(), atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as a box
        if engine := figure.get_layout_engine():
            engine.execute(figure)
            figure.set_layout_engine(None)  # lay out once; every further drawing would move the axes a little
        metadata = {"Date": None} if suffix == ".svg" else None
        box = figure.get_tightbbox().padded(0.2)  # bbox_inches="tight" would draw twice
        figure.savefig(file, format=suffix[1:], dpi=dpi, bbox_inches=box, metadata=metadata)

"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

ROUNDING = 1e-12  # differences of equal numbers come to less


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Format with ``digits`` decimals, or with two significant digits if that were zero, such as -4.2e-05; zero has no sign."""
    if abs(value) < ROUNDING:
        return f"{0:.{digits}f}"
    plus, is_tiny = "+" if sign else "", abs(value) < 0.5 * 10.0**-digits
    return f"{value:{plus}.1e}" if is_tiny else f"{value:{plus}.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many cells as lines: the first column aligned left, the others right, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ((f"{cell:{'>' if number else '<'}{widths[number]}}" for number, cell in enumerate(row)) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)

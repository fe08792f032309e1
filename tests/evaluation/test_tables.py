"""Numbers and tables as text."""

from __future__ import annotations

import pytest

from evaluation.tables import aligned, fixed


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        (0.12345, False, "0.1235"), (-4.2e-5, False, "-4.2e-05"), (3e-5, True, "+3.0e-05"), (-0.0, True, "0.0000"),
        (0.1 + 0.2 - 0.3, True, "0.0000"), (5e-5, False, "0.0001"), (-1, True, "-1.0000"), (float("-inf"), False, "-inf"),
    ],
)  # fmt: skip
def test_no_number_reads_as_zero(value: float, sign: bool, expected: str) -> None:
    assert fixed(value, 4, sign=sign) == expected


def test_columns_do_not_touch() -> None:
    rows = [["", "first", "second"], ["a name", "90.00 – 100.00", "100.00 – 100.00"], ["b", "–", ""]]
    assert aligned(rows).splitlines()[1] == "a name  90.00 – 100.00  100.00 – 100.00"

"""README's table of options is the options; set README_UPDATE=1 to write it anew."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from evaluation.options import InferenceOptions
from optim.options import TrainOptions

README = Path(__file__).parent.parent / "README.md"
ONLY_INFERENCE = ("txt_db", "img_db", "train_config", "batch_size", "candidates", "report")


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "–"
    return "–" if default in ("", None) else f"{default:g}" if isinstance(default, float) else str(default)


def rows(options: type, names: tuple[str, ...] | None = None) -> str:
    fields = [field for field in dataclasses.fields(options) if names is None or field.name in names]
    lines = [f"| `{field.name}` | {shown(field.default)} | {field.metadata['help']} |" for field in fields]
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *lines])


def test_table_of_options() -> None:
    text = README.read_text()
    expected = (
        f"<!-- options -->\n{rows(TrainOptions)}\n\nOnly `inf_itm.py`:\n\n{rows(InferenceOptions, ONLY_INFERENCE)}\n<!-- -->"
    )
    start, end = text.index("<!-- options -->"), text.index("<!-- -->") + len("<!-- -->")
    if os.environ.get("README_UPDATE"):
        README.write_text(text[:start] + expected + text[end:])
    else:
        assert text[start:end] == expected

"""README and docs/ stay small, name only what exists, and list the options as they are.

``DOCS_UPDATE=1 python -m pytest tests/test_docs.py`` rewrites docs/options.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any, get_args

import pytest

from evaluation.options import InferenceOptions
from optim.options import TrainOptions

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = "data formats fidelity training evaluation results performance robustness api options log"
PACKAGES = "benchmarks|config|data|docs|evaluation|examples|model|optim|scripts|tests|utils"
document = pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem)


def test_size() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200
    assert {path.stem for path in DOCS.glob("*.md")} == {*PAGES.split()}


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_blocks(path))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@document
def test_links(document: Path) -> None:
    for name, anchor in re.findall(r"\]\((?!https://)([^)\s#]*)#?([^)\s]*)\)", without_blocks(document)):
        page = document.parent / name if name else document
        assert page.exists(), name
        assert not anchor or anchor in anchors(page), anchor


@document
def test_what_is_named_exists(document: Path) -> None:
    """Paths of the tree, targets of make, modules run with -m, and tests."""
    text = document.read_text()
    named = set(re.findall(rf"(?<![\w/.])(?:{PACKAGES})/[\w./-]+\.(?:py|sh|json|md)\b", text))
    named |= set(re.findall(r"(?:python|bash|torchrun .*) ([\w/]+\.(?:py|sh))", text))
    named |= set(re.findall(rf"`((?:{PACKAGES})/[\w/]*)`", text))
    named |= {module.replace(".", "/") + ".py" for module in re.findall(r"python -m (tests\.[\w.]+)", text)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)(?:GOLDEN_DIR=… )?make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    options = {field.name for field in dataclasses.fields(TrainOptions)}
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests and name not in options] == []


def test_pages_named_in_the_code_exist() -> None:
    code = [path for name in PACKAGES.split("|") for path in (ROOT / name).rglob("*.py")]
    named = [(path, page) for path in code for page in re.findall(r"docs/[\w-]+\.md", path.read_text())]
    assert [(path, page) for path, page in named if not (ROOT / page).exists()] == []


def formatted(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "–"
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default) or "–"


def table(cls: type, names: list[str]) -> str:
    hints, rows = typing.get_type_hints(cls), ["| option | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name in names:
            hint = hints[field.name]
            literals = [part for part in (hint, *get_args(hint)) if typing.get_origin(part) is typing.Literal]
            choices = [value for literal in literals for value in get_args(literal)]  # a registry's may grow
            meaning = ": ".join(filter(None, [field.metadata["help"], " ".join(f"`{value}`" for value in choices)]))
            rows.append(f"| `{field.name}` | {formatted(field.default)} | {meaning} |")
    return "\n".join(rows)


def options_page() -> str:
    training, inference = (
        {field.name: (field.default, field.metadata["help"]) for field in dataclasses.fields(cls)}
        for cls in (TrainOptions, InferenceOptions)
    )
    shared = [name for name in training if training[name] == inference.get(name)]
    return f"""\
# Options

Generated from `optim/options.py` and `evaluation/options.py` by `DOCS_UPDATE=1 python -m pytest tests/test_docs.py`.

Give options on the command line (`--name value`; `--name` or `--no-name` for yes and no) or in the JSON file of `--config`.
The command line overrides the file; the last of two equal options counts. Names must not be abbreviated.
`--no-name` also unsets an option whose default is none: `--config log/hps.json --no-IAIS` trains without IAIS.

## Both programs

{table(TrainOptions, shared)}

## `train_itm_hard_negatives.py`

{table(TrainOptions, [name for name in training if name not in shared])}

## `inf_itm.py`

{table(InferenceOptions, [name for name in inference if name not in shared])}
"""


def test_options_page() -> None:
    page = DOCS / "options.md"
    if os.environ.get("DOCS_UPDATE"):
        page.write_text(options_page())
    assert page.read_text() == options_page()

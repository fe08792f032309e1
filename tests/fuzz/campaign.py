"""Runs a target on many inputs and counts what came of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import checkpoints, records, sources
from tests.fuzz.target import Target

TARGETS: dict[str, Callable[[Path], list[Target]]] = {
    "pages": records.page_targets,
    "records": lambda folder: records.record_targets(),
    "sidecars": records.sidecar_targets,
    "captions": sources.caption_targets,
    "rows": sources.row_targets,
    "images": sources.image_targets,
    "checkpoints": checkpoints.checkpoint_targets,
}
_ROUND = 2500  # Hypothesis slows down in long runs


@dataclass
class Tally:
    """What came of a target's inputs: numbers of each kind, the findings by what they are, and the most that one took."""

    kinds: Counter[str] = field(default_factory=Counter)
    findings: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0


def run(target: Target, inputs: int) -> Tally:
    """Run ``target`` on so many different inputs, the same ones every time."""
    tally, seen = Tally(), set()

    def try_one(data: bytes) -> None:
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen or len(seen) == inputs:
            return
        seen.add(digest)
        outcome = sandbox.run(data)
        tally.kinds[outcome.kind] += 1
        tally.seconds, tally.memory = max(tally.seconds, outcome.seconds), max(tally.memory, outcome.memory)
        if outcome.kind == "finding":
            tally.findings.setdefault(outcome.detail, data)

    with target.sandbox() as sandbox:
        assert sandbox.run(target.sound).kind == "result", f"{target.name}: a sound input is refused"
        number = 0
        while len(seen) < inputs:
            before = len(seen)
            campaign = settings(
                max_examples=min(_ROUND, inputs - before + 50),  # some come twice
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            seed(number)(campaign(given(target.inputs)(try_one)))()
            assert len(seen) > before, f"{target.name}: no new inputs"
            number += 1
    return tally

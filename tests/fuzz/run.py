"""Fuzz every reader with many inputs, and measure what bombs take: ``python -m tests.fuzz.run --inputs 10000``.

Prints the tables of docs/log.md. What led to a finding is left in files, which are named, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.fuzz.bombs import BOMBS, Bomb
from tests.fuzz.campaign import TARGETS, Tally, run
from tests.fuzz.sandbox import Outcome
from tests.fuzz.target import MIB


def fuzz(inputs: int, named: tuple[str, int]) -> tuple[str, int, Tally]:
    """The target of this group and number: its name, what it may take, and what came of its inputs."""
    group, number = named
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[group](Path(folder))[number]
        return target.name, target.memory, run(target, inputs)


def count(group: str) -> int:
    """How many targets a group has."""
    with tempfile.TemporaryDirectory() as folder:
        return len(TARGETS[group](Path(folder)))


def bombs() -> Iterator[tuple[Bomb, Outcome]]:
    """Every bomb and what came of it."""
    for make in BOMBS.values():
        with tempfile.TemporaryDirectory() as folder:
            for bomb in make(Path(folder)):
                yield bomb, bomb.run()


def main(arguments: list[str] | None = None) -> None:
    """Fuzz, then set off the bombs."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--inputs", type=int, default=10_000, help="different inputs for each reader (%(default)s)")
    options = parser.parse_args(arguments)
    found = False
    print("| reader | inputs | results | documented errors | findings | longest | most memory | allowed |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        targets = [(group, number) for group in TARGETS for number in range(count(group))]
        for name, allowed, tally in pool.map(partial(fuzz, options.inputs), targets):
            kinds = tally.kinds
            counts = f"{kinds.total():,} | {kinds['result']:,} | {kinds['error']:,} | {kinds['finding']:,}"
            memory = f"{tally.memory / MIB:.0f} MiB | {allowed // MIB} MiB"
            print(f"| {name} | {counts} | {1000 * tally.seconds:.0f} ms | {memory} |", flush=True)
            for detail, data in tally.findings.items():
                found = True
                with tempfile.NamedTemporaryFile(prefix="finding-", delete=False) as file:
                    file.write(data)
                print(f"finding: {name}: {detail}: {file.name}", file=sys.stderr, flush=True)
    print("\n| bomb | bytes | outcome | time | most memory | allowed |")
    print("|---|---:|---|---:|---:|---:|")
    for bomb, outcome in bombs():
        found |= outcome.kind == "finding"
        memory = f"{outcome.memory / MIB:.0f} MiB | {bomb.memory // MIB} MiB"
        kind = outcome.detail if outcome.kind == "finding" else {"error": "refused", "result": "read"}[outcome.kind]
        print(f"| {bomb.name} | {len(bomb.data):,} | {kind} | {1000 * outcome.seconds:.0f} ms | {memory} |", flush=True)
    sys.exit(found)


if __name__ == "__main__":
    main()

"""Compare the speed of the program with a plain implementation of the same work and with the peak of the machine.

    python benchmarks/run.py                                     UNITER-base in fp32 and in the machine's half precision
    python benchmarks/run.py --models tiny base large --json results.json

Data are random, of Flickr30k's sizes, in a real database. Each measurement has a process of its own. Program and reference
take turns, since a shared machine has slow minutes, and the best turn counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, in_new_process
from benchmarks.measures import Bench, Measured
from benchmarks.synthetic import write_data
from model.config import UniterConfig
from utils.errors import InputError, one_line_errors
from utils.files import save_json
from utils.precision import choose_device, choose_precision
from utils.provenance import ROOT, provenance

PARTS = ["start_up", "matmul", "loader", "evaluation", "micro_step"]
Turns = list[Measured]


def measure(part: str, *settings: Any) -> Measured:
    """Measure ``part``, a method of ``Bench`` with these ``settings``; meant for a new process."""
    return getattr(Bench(*settings), part)()


def compare(options: argparse.Namespace, model: str) -> dict[str, dict[str, Turns]]:
    """Measure everything for one model; return the turns by part and by "reference" or the program's precision."""
    found: dict[str, dict[str, Turns]] = {part: defaultdict(list) for part in options.parts}
    for turn in range(options.turns):
        for part in options.parts:
            precisions = options.precisions if part in ("matmul", "micro_step", "evaluation") else options.precisions[:1]
            runs = [(precision, precision, False) for precision in precisions]
            if part not in ("matmul", "start_up"):
                runs.insert(0, ("reference", "fp32", True))
            for name, precision, reference in runs:
                print(f"\rUNITER-{model}, turn {turn + 1}: {part}, {name}" + " " * 20, end="", file=sys.stderr, flush=True)
                measured = in_new_process(measure, part, options, model, precision, reference, time.time())
                found[part][name].append(measured)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return found


def best(turns: Turns, name: str) -> float:
    """Return the highest of rates, the lowest of seconds and bytes."""
    values = [turn[name] for turn in turns]
    return (max if name.endswith("/s") or name == "flops" else min)(values)


def table(model: str, found: dict[str, dict[str, Turns]]) -> str:
    """Format the best of each number, with its ratio to the reference and its share of the peak."""
    lines = [f"UNITER-{model}"]
    for part, runs in found.items():
        for name, turns in runs.items():
            lines.append(f"  {part}, {name}")
            for key in turns[0]:
                value = best(turns, key)
                digits = 0 if value >= 1000 else 2
                if key == "flops":
                    text = f"{value / 1e12:.3f} TFLOP/s"
                    if part != "matmul" and name in found.get("matmul", {}):
                        text += f" ({value / best(found['matmul'][name], key):.0%} of the peak)"
                else:
                    text = f"{value / 1e6:,.0f} MB" if key.endswith("bytes") else f"{value:,.{digits}f}"
                    if name != "reference" and "reference" in runs and key in runs["reference"][0]:
                        other = best(runs["reference"], key)
                        text += f" ({value / other if key.endswith('/s') else other / value:.2f}x)"
                lines.append(f"    {key.removesuffix(' bytes')}: {text}")
    return "\n".join(lines)


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "base", "large"), default=["base"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: fp32 and what auto means")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=400, help="candidates per half, and images in the database")
    parser.add_argument("--texts", type=int, default=1, help="texts scored in evaluation, each against all images")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    if device.type != "cuda" and not sys.platform.startswith("linux"):
        raise InputError(f"device {device.type}: memory is measured on Linux or on a CUDA device, expected one of them")
    wanted = options.precisions or ["fp32", "auto"]
    options.precisions = list(dict.fromkeys(choose_precision(name, False, device, "precisions") for name in wanted))
    results: dict[str, Any] = {"machine": provenance() | {"device": describe(device)}}
    results["arguments"] = {key: value for key, value in vars(options).items() if key != "json"}
    with tempfile.TemporaryDirectory() as folder:
        options.data = folder
        for model in options.models:
            config = UniterConfig.from_json(ROOT / f"config/uniter-{model}.json")
            if not (Path(folder) / "images").exists():
                write_data(Path(folder), config, images=options.candidates, texts=2 * options.candidates)
            results[model] = compare(options, model)
            print(table(model, results[model]), flush=True)
    print(f"on {results['machine']['device']}, {results['machine']['machine']}, torch {results['machine']['torch']}")
    if options.json:
        save_json(options.json, results)


if __name__ == "__main__":
    main()

"""How fast the program is, beside a straightforward implementation of the same work and beside the machine's own peak.

    python benchmarks/run.py                                     UNITER-base in fp32 and in the machine's half precision
    python benchmarks/run.py --models tiny base large --json results.json

Data are random, of Flickr30k's sizes, in a real database. Each measurement is a process of its own; program and reference take
turns, since machines have slow minutes, and the fastest turn counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from benchmarks.measures import Bench, Measured
from benchmarks.synthetic import write_data
from model.config import UniterConfig
from utils.files import save_json
from utils.precision import choose_device, choose_precision
from utils.provenance import ROOT, provenance


def measure(arguments: argparse.Namespace, part: str, model: str, precision: str, reference: bool) -> Measured:
    """What a process of its own measures."""
    passed = {key: getattr(arguments, key) for key in ("device", "data", "candidates", "texts", "halves", "n_workers")} | {
        "models": model,
        "precisions": precision,
        "part": part,
        "started": time.time(),
    }
    words = [word for key, value in passed.items() for word in (f"--{key}", str(value))]
    flags = ["--reference"] * reference + ["--checkpointing"] * arguments.checkpointing
    done = subprocess.run([sys.executable, __file__, *words, *flags], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} of UNITER-{model} in {precision} failed")
    return json.loads(done.stdout.splitlines()[-1])


def best(of_turns: list[Measured], name: str) -> float:
    """The best of the turns: the lowest of seconds and bytes, the highest of rates."""
    values = [turn[name] for turn in of_turns]
    return (max if name.endswith("/s") or name == "flops" else min)(values)


def compare(arguments: argparse.Namespace, model: str) -> dict[str, dict[str, list[Measured]]]:
    """All measurements of a model, by part and by who did it, a list entry for each turn."""
    precisions = arguments.precisions
    found: dict[str, dict[str, list[Measured]]] = {part: defaultdict(list) for part in arguments.parts}
    for turn in range(arguments.turns):
        for part in arguments.parts:
            who = [("reference", "fp32", True)] if part not in ("matmul", "start_up") else []
            own = precisions if part in ("matmul", "micro_step", "evaluation") else precisions[:1]
            for name, precision, reference in [*who, *((precision, precision, False) for precision in own)]:
                print(f"\rUNITER-{model}, turn {turn + 1}: {part}, {name}" + " " * 20, end="", file=sys.stderr, flush=True)
                found[part][name].append(measure(arguments, part, model, precision, reference))
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return found


def table(model: str, found: dict[str, dict[str, list[Measured]]]) -> str:
    """What was found, a line for each part and who did it, with its ratio to the reference and its share of the peak."""
    lines = [f"UNITER-{model}"]
    peaks = {name: best(turns, "flops") for name, turns in found.get("matmul", {}).items()}
    for part, by_name in found.items():
        for name, turns in by_name.items():
            others = by_name.get("reference", []) if name != "reference" else []
            lines.append(f"  {part:<11}{name:<10}" + line(turns, others, peaks.get(name) if part != "matmul" else None))
            for key, value in turns[0].items():
                if isinstance(value, dict):
                    nested, theirs = [turn[key] for turn in turns], [turn[key] for turn in others]
                    lines.append(f"    {key}:" + line(nested, theirs, None))
    return "\n".join(lines)


def line(turns: list[Measured], others: list[Measured], peak: float | None) -> str:
    """The best of each number in ``turns``, with its ratio to the best of ``others`` and operations as a share of ``peak``."""
    words = ""
    for key in (key for key, value in turns[0].items() if not isinstance(value, dict)):
        value = best(turns, key)
        if key == "flops":
            words += f"  {value / 1e12:.3f} TFLOP/s" + (f" ({value / peak:.0%} of the peak)" if peak else "")
            continue
        if key.endswith("bytes"):
            words += f"  {key.removesuffix('bytes')}{value / 1e6:,.0f} MB"
        else:
            words += f"  {key} {value:,.{0 if value >= 1000 else 2}f}"
        if others and key in others[0]:
            other = best(others, key)
            words += f" ({value / other if key.endswith('/s') else other / value:.2f}x)"
    return words


def main() -> None:
    """Measure and print, or on behalf of another process measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["start_up", "matmul", "loader", "evaluation", "micro_step"]
    parser.add_argument("--models", nargs="+", choices=("tiny", "base", "large"), default=["base"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: fp32 and what auto means")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=400, help="of a half, and images that a text is scored against")
    parser.add_argument("--texts", type=int, default=1, help="scored in evaluation, each against so many images")
    parser.add_argument("--halves", type=int, default=10, help="text-anchored halves that the loader collects")
    parser.add_argument("--n_workers", type=int, default=2, help="reading processes of the program")
    parser.add_argument("--checkpointing", action="store_true", help="the program's micro-step with gradient checkpointing")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    of_children = parser.add_argument_group("given by this program to the processes that it starts")
    of_children.add_argument("--part", choices=parts)
    of_children.add_argument("--data")
    of_children.add_argument("--started", type=float)
    of_children.add_argument("--reference", action="store_true")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(getattr(Bench(arguments), arguments.part)()))
        return

    device = choose_device(arguments.device)
    if device.type != "cuda" and not sys.platform.startswith("linux"):
        sys.exit("memory is measured through Linux's /proc or on a CUDA device: expected one of them")
    arguments.precisions = arguments.precisions or list(dict.fromkeys(["fp32", choose_precision("auto", False, device)]))
    results: dict[str, Any] = {"machine": provenance() | {"device": describe(device)}, "arguments": {}}
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = folder
        for model in arguments.models:
            config = UniterConfig.from_json(ROOT / f"config/uniter-{model}.json")
            if not (Path(folder) / "images").exists():
                write_data(Path(folder), config, images=arguments.candidates, texts=2 * arguments.candidates)
            results[model] = compare(arguments, model)
            print(table(model, results[model]), flush=True)
    results["arguments"] = {key: value for key, value in vars(arguments).items() if key not in ("json", "data")}
    print(f"on {results['machine']['device']}, {results['machine']['machine']}, torch {results['machine']['torch']}")
    if arguments.json:
        save_json(arguments.json, results)


if __name__ == "__main__":
    main()

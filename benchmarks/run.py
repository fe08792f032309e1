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
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.machine import describe, fastest_product, memory_peak, start_memory_peak
from benchmarks.reference import Reference, decode, read, to
from benchmarks.synthetic import write_data
from data.image_cache import ImageCache
from data.loader import Loader
from data.names import Names
from data.tasks import HardNegativeTask, PairSource, read_pairs
from evaluation.score import score_matrix
from model.config import UniterConfig
from model.iais import REGULARISERS
from model.packing import ChunkSize
from model.retrieval import Compute, RetrievalModel
from optim.trainer import Trainer
from utils.distributed import Alone
from utils.files import save_json
from utils.precision import Precision, choose_device, choose_precision
from utils.provenance import ROOT, provenance
from utils.run_options import TrainOptions

Measured = dict[str, Any]
HARD = 31


class Bench:
    """What one process measures: a model on random data, by the program or by the reference."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = choose_device(arguments.device)
        self.config = UniterConfig.from_json(ROOT / f"config/uniter-{arguments.models[0]}.json")
        precision = Precision(choose_precision(arguments.precisions[0], False, self.device), self.device)
        chunk = ChunkSize.for_device(self.device, self.config.intermediate_size, arguments.candidates)
        self.compute = Compute(precision, chunk, checkpointing=arguments.checkpointing)
        data = Path(arguments.data)
        self.source = PairSource(str(data / "texts.db"), str(data / "images"), self.config, {})

    def model(self) -> RetrievalModel:
        """Random weights, the same in each process."""
        torch.manual_seed(0)
        return RetrievalModel(self.config).to(self.device)

    def start_up(self) -> Measured:
        """Seconds from nothing to the first score: imports, databases, a model of random weights, one pair."""
        model = self.model().eval()
        batch = read_pairs([(self.source, self.source.text_db.ids[0], self.source.image_names[0])]).to(self.device)
        with torch.no_grad():
            model(batch, self.compute).scores.tolist()
        return {"seconds": time.time() - self.arguments.started}

    def matmul(self) -> Measured:
        """The machine's peak in this arithmetic."""
        return {"flops": fastest_product(self.compute.precision.dtype, self.device)}

    def loader(self) -> Measured:
        """Images a second, collected for text-anchored halves, and text records a second."""
        wanted = self.arguments.candidates
        task = self.task(halves := self.arguments.halves)
        if self.arguments.reference:
            pairs = [[(text, name) for _, text, name in task.candidates("text", step)] for step in range(halves)]
            seconds = clock(lambda: [read(self.source, of_half) for of_half in pairs])
            some = self.source.image_names[:wanted]
            decoding = clock(lambda: [decode(self.source.image_db._store.get(name)) for name in some])
            return {"images/s": wanted * halves / seconds, "decoded images/s": len(some) / decoding}
        loader = Loader(self.device, self.arguments.n_workers, pin=True)
        numbers = list(range(1, 2 * halves, 2))
        arriving = loader(task, [numbers[0], *numbers])
        next(arriving)  # by then the reading processes run
        seconds = clock(lambda: [None for _ in arriving])
        texts = self.source.text_db.ids
        records = clock(lambda: [self.source.text_db[text] for text in texts])
        cache = ImageCache.of([self.source], loader, 2**40)
        assert cache is not None
        task.without_images = True
        held = map(cache.fill, loader(task, [numbers[0], *numbers]))
        next(held)
        from_memory = clock(lambda: [None for _ in held])
        return {
            "images/s": wanted * halves / seconds,
            "images/s held in memory": wanted * halves / from_memory,
            "text records/s": len(texts) / records,
        }

    def task(self, micro_steps: int) -> HardNegativeTask:
        """The halves of so many micro-steps."""
        return HardNegativeTask([self.source], negative_size=self.arguments.candidates - 1, micro_steps=micro_steps)

    def micro_step(self) -> Measured:
        """Seconds of the parts of one micro-step, both halves and an update, and how much memory it takes at its peak."""
        options = TrainOptions(
            train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", IAIS="singular",
            train_batch_size=1, negative_size=self.arguments.candidates - 1, hard_neg_size=HARD, num_train_steps=1000,
        )  # fmt: skip
        trainer = Trainer(self.model(), options, self.compute, Alone())
        parts: dict[str, float] = defaultdict(float)
        REGULARISERS["singular"] = self.timed(parts, "of which IAIS", REGULARISERS["singular"])
        half = self.reference_half(trainer, parts) if self.arguments.reference else self.program_half(trainer, parts)

        def step() -> None:
            trainer.optimiser.step()

        for parameter in trainer.model.parameters():
            assert parameter.grad is not None
        step()  # allocates the moments
        trainer.gradient.zero()
        before = start_memory_peak(self.device)
        parts.clear()
        started = time.perf_counter()
        for anchor in ("image", "text"):
            half(anchor)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), options.grad_norm)
        self.timed(parts, "optimiser", step)()
        seconds = time.perf_counter() - started
        peak = memory_peak(self.device)
        return {"seconds": seconds, **parts, "peak bytes": peak, "beyond the state": peak - before}

    def program_half(self, trainer: Trainer, parts: dict[str, float]) -> Callable[[str], None]:
        """How the program does a half of each kind, which is read beforehand as its reading processes would."""
        task, objective = self.task(1), trainer.objective
        halves = {half.anchor: half.to(self.device) for half in (task[0], task[1])}

        def half(anchor: str) -> None:
            candidates = self.timed(parts, "mining", objective.mine)(trainer.model, halves[anchor], self.compute)
            loss = self.timed(parts, "hard pass", objective.loss)(trainer.model, halves[anchor], self.compute, candidates)
            self.timed(parts, "backward", (loss.hinge.mean() + loss.alignment.sum()).backward)()

        return half

    def reference_half(self, trainer: Trainer, parts: dict[str, float]) -> Callable[[str], None]:
        """How the reference does one."""
        task, reference = self.task(1), Reference(trainer.model)
        batches = {
            anchor: to(read(self.source, [(text, name) for _, text, name in task.candidates(anchor, 0)]), self.device)
            for anchor in ("image", "text")
        }

        def half(anchor: str) -> None:
            candidates = self.timed(parts, "mining", reference.mine)(batches[anchor])
            modality = "V" if anchor == "image" else "L"
            loss = self.timed(parts, "hard pass", reference.loss)(batches[anchor], candidates, HARD, "singular", modality)
            self.timed(parts, "backward", loss.backward)()

        return half

    def evaluation(self) -> Measured:
        """Pairs a second of some texts against all images of the database, and their floating-point operations a second."""
        texts = self.first_texts(self.arguments.texts)
        images, model = self.source.image_names, self.model()
        if self.arguments.reference:
            reference = Reference(model)
            seconds = clock(lambda: reference.evaluate(self.source, texts, images[:], self.arguments.candidates, self.device))
        else:
            loader = Loader(self.device, self.arguments.n_workers)
            seconds = clock(lambda: score_matrix(model, self.source, self.compute, loader, Alone()))
        regions = [len(self.source.image_db[image].boxes) for image in images]
        words = self.source.text_db.lengths + 2
        needed = sum(self.operations(int(of_text) + of_image) for of_text in words for of_image in regions)
        return {"pairs/s": len(texts) * len(images) / seconds, "flops": needed / seconds}

    def first_texts(self, count: int) -> list[str]:
        """Leave only so many texts in the source, which go on to have all its images."""
        database, source = self.source.text_db, self.source
        database.ids = Names(database.ids[:count])
        database.lengths = database.lengths[:count]
        database.image_of = source.image_of = source.image_of[:count]
        return list(database.ids)

    def operations(self, length: int) -> float:
        """Floating-point operations that the encoder needs for a pair when its last layer computes [CLS] alone."""
        c = self.config
        projections, feed_forward = 4 * c.hidden_size**2, 2 * c.hidden_size * c.intermediate_size
        whole = 2 * length * (projections + feed_forward) + 4 * length**2 * c.hidden_size
        last = 2 * length * 2 * c.hidden_size**2 + 2 * (projections / 2 + feed_forward) + 4 * length * c.hidden_size
        return (c.num_hidden_layers - 1) * whole + last

    def timed(self, parts: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, adding its seconds to part ``name``."""

        def call(*values: Any) -> Any:
            self.wait()
            started = time.perf_counter()
            result = function(*values)
            self.wait()
            parts[name] += time.perf_counter() - started
            return result

        return call

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def clock(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


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
    values = [turn[name] for turn in of_turns if name in turn]
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
    """What was found, one line for each part and each who, with its ratio to the reference and its share of the peak."""
    lines = [f"UNITER-{model}"]
    peaks = {name: best(turns, "flops") for name, turns in found.get("matmul", {}).items()}
    for part, by_name in found.items():
        for name, turns in by_name.items():
            line = f"  {part:<11}{name:<10}"
            for key in turns[0]:
                value = best(turns, key)
                if key == "flops":
                    line += f"  {value / 1e12:.3f} TFLOP/s"
                    if part != "matmul" and name in peaks:
                        line += f" ({value / peaks[name]:.0%} of the peak)"
                    continue
                unit = 1e6 if "bytes" in key or key.startswith("beyond") else 1
                line += f"  {key.replace('bytes', 'MB')} {value / unit:,.{0 if unit > 1 or value >= 100 else 2}f}"
                if key == "beyond the state":
                    line += " MB"
                if name != "reference" and "reference" in by_name and key in by_name["reference"][0]:
                    other = best(by_name["reference"], key)
                    line += f" ({value / other if key.endswith('/s') else other / value:.2f}x)"
            lines.append(line)
    return "\n".join(lines)


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

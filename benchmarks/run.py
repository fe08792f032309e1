"""Compare the speed of the program with a plain implementation of the same work and with the peak of the machine.

    python benchmarks/run.py                                     UNITER-base in fp32 and in the machine's half precision
    python benchmarks/run.py --models tiny base large --json results.json

Data are random, of Flickr30k's sizes, in a real database. Each measurement has a separate process. Program and reference
take turns, since a shared machine has slow minutes, and the best turn counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors  # isort: split

import torch
from torch import nn

from benchmarks.machine import describe, fastest_product, in_new_process, memory_peak, seconds_of, start_memory_peak, timing
from benchmarks.reference import Reference, decode, read
from benchmarks.synthetic import HARD, compute_settings, open_split, random_model, train_options, write_data
from data.datasets import Anchor, HardNegativeDataset
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import read_pairs
from evaluation.scoring import score_matrix
from model.config import UniterConfig
from model.cpu import recompute_in_backward
from model.iais import REGULARISERS
from model.retrieval import RetrievalModel
from optim.trainer import Trainer
from utils.distributed import SingleProcess
from utils.errors import InputError
from utils.files import save_json
from utils.precision import choose_device, choose_precision
from utils.provenance import ROOT, provenance

PARTS = ["start_up", "matmul", "loader", "evaluation", "micro_step"]
HALVES, WORKERS = 10, 2  # text-anchored halves that the loader collates; loader workers of the program
Measured = dict[str, float]
Turns = list[Measured]
Timed = Callable[[str], AbstractContextManager[object]]


class Bench:
    """A model on the random data in ``options.data``, run by the program or by the reference.

    Names of rates end in "/s" ("flops" is one too), names of memory in "bytes"; everything else is in seconds.

    Args:
        options: those of the command line.
        name: "reference" or the program's precision.
        started: when this process was started, in ``time.time()``.
    """

    def __init__(self, options: argparse.Namespace, model: str, name: str, started: float) -> None:
        self.candidates, self.texts, self.started = options.candidates, options.texts, started
        self.reference = name == "reference"
        self.device = choose_device(options.device)
        self.config = UniterConfig.from_json(ROOT / f"config/uniter-{model}.json")
        self.compute = compute_settings(self.config, options.candidates, "fp32" if self.reference else name, self.device)
        self.split = open_split(Path(options.data), self.config)

    def start_up(self) -> Measured:
        """Everything up to the first score: imports, databases, a model with random weights, one pair."""
        self._score_one_pair(random_model(self.config, self.device))
        return {"seconds": time.time() - self.started}

    def matmul(self) -> Measured:
        """The machine's peak in this arithmetic."""
        return {"flops": fastest_product(self.compute.precision.dtype, self.device)}

    def loader(self) -> Measured:
        """Images collated for text-anchored halves, images decoded, and texts read."""
        images, texts = self.split.image_names[:], self.split.text_db.ids[:]
        dataset = HardNegativeDataset([self.split], negative_size=self.candidates - 1, micro_steps=1000)
        if self.reference:
            halves = [[pair[1:] for pair in dataset.candidates("text", step)] for step in range(HALVES)]
            collated = self.candidates * self._rate(HALVES, (read(self.split, half) for half in halves))
            decoded = self._rate(len(images), (decode(self.split.image_db._store.get(name)) for name in images))
            return {"images/s": collated, "decoded images/s": decoded}
        cache, found = ImageCache.of([self.split], Loader(self.device), 2**40), {}
        for name, n_workers in (("", 0), (f"by {WORKERS} processes ", WORKERS), ("held in memory ", 0)):
            dataset.without_images = name.startswith("held")
            ahead = range(1, 2 * (2 * n_workers + 1), 2)  # what the workers read before it is requested
            halves = Loader(self.device, n_workers, pin=True)(dataset, [*ahead, *range(1, 2 * HALVES, 2)])
            halves = map(cache.fill, halves) if dataset.without_images else halves
            for _ in ahead:
                next(halves)
            found[f"{name}images/s"] = self.candidates * self._rate(HALVES, halves)
        found["decoded images/s"] = self._rate(len(images), (self.split.image_db[name] for name in images))
        found["text records/s"] = self._rate(len(texts), (self.split.text_db[text] for text in texts))
        return found

    def micro_step(self) -> Measured:
        """One micro-step, by half and by step, with an update, and the peak of its memory."""
        options = train_options(self.candidates - 1)
        model = random_model(self.config, self.device)
        recompute_in_backward(model)
        trainer = Trainer(model, options, self.compute, SingleProcess())
        seconds: Counter[str] = Counter()
        timed = partial(timing, seconds, device=self.device)
        self._half(trainer, "image", HARD + 1, timed)  # loads libraries at their first use
        trainer.optimizer.step()  # at learning rate 0; creates the moments
        trainer.gradient.zero()
        seconds.clear()
        before = start_memory_peak(self.device)
        for anchor in ("image", "text"):
            with patch.dict(REGULARISERS, singular=timed(f"{anchor}-anchored, of which IAIS")(REGULARISERS["singular"])):
                self._half(trainer, anchor, self.candidates, timed)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), options.grad_norm)
        with timed("optimizer"):
            trainer.optimizer.step()
        peak = memory_peak(self.device)
        total = sum(value for name, value in seconds.items() if "of which" not in name)
        return {"seconds": total, **seconds, "peak bytes": peak, "beyond the state bytes": peak - before}

    def evaluation(self) -> Measured:
        """Pairs of the first texts and all images, the encoder's floating-point operations, and memory."""
        images, texts, model = self.split.image_names, self.split.text_db, random_model(self.config, self.device)
        texts.ids, texts.lengths = texts.ids[: self.texts], texts.lengths[: self.texts]
        texts.image_of = self.split.image_of = self.split.image_of[: self.texts]
        self._score_one_pair(model)
        before = start_memory_peak(self.device)
        if self.reference:
            run = partial(Reference(model).evaluate, self.split, list(texts.ids), images[:], self.candidates, self.device)
        else:
            run = partial(score_matrix, model, self.split, self.compute, Loader(self.device, WORKERS), SingleProcess())
        seconds = seconds_of(run, self.device)
        beyond = memory_peak(self.device) - before
        regions = [len(self.split.image_db[image].boxes) for image in images]
        lengths = [text + image for text in (texts.lengths + 2).tolist() for image in regions]
        flops = sum(map(self._operations, lengths)) / seconds
        return {"pairs/s": len(lengths) / seconds, "flops": flops, "beyond the weights bytes": beyond}

    def _score_one_pair(self, model: RetrievalModel) -> None:
        """Score with the program, which also loads the libraries that are loaded at their first use."""
        batch = read_pairs([(self.split, self.split.text_db.ids[0], self.split.image_names[0])]).to(self.device)
        with torch.no_grad():
            model.eval()(batch, self.compute).scores.tolist()

    def _half(self, trainer: Trainer, anchor: Anchor, candidates: int, timed: Timed) -> None:
        """Run one half with ``candidates`` candidates; reading it is not timed, since workers read ahead."""
        dataset = HardNegativeDataset([self.split], negative_size=candidates - 1, micro_steps=1)
        if self.reference:
            reference, modality = Reference(trainer.model), "V" if anchor == "image" else "L"
            batch = read(self.split, [pair[1:] for pair in dataset.candidates(anchor, 0)]).to(self.device)
            mine = partial(reference.mine, batch)
            loss = partial(reference.loss, batch, hard=HARD, regulariser="singular", modality=modality)
        else:
            half = dataset[0 if anchor == "image" else 1].to(self.device)
            mine = partial(trainer.objective.mine, trainer.model, half, self.compute)
            loss = partial(trainer.objective.loss, trainer.model, half, self.compute)
        with timed(f"{anchor}-anchored mining"):
            scores = mine()
        with timed(f"{anchor}-anchored hard pass"):
            terms = loss(scores)
        with timed(f"{anchor}-anchored backward"):
            (terms if self.reference else terms.hinge.mean() + terms.alignment.sum()).backward()

    def _operations(self, length: int) -> float:
        """Floating-point operations of the encoder for a pair of ``length`` tokens if its last layer computes [CLS] alone."""
        c = self.config
        projections, feed_forward = 4 * c.hidden_size**2, 2 * c.hidden_size * c.intermediate_size
        whole = 2 * length * (projections + feed_forward) + 4 * length**2 * c.hidden_size
        last = 2 * length * 2 * c.hidden_size**2 + 2 * (projections / 2 + feed_forward) + 4 * length * c.hidden_size
        return (c.num_hidden_layers - 1) * whole + last

    def _rate(self, count: int, items: Iterable[object]) -> float:
        return count / seconds_of(lambda: deque(items, maxlen=0), self.device)


def measure(part: str, *settings: Any) -> Measured:
    """Measure ``part``, a method of ``Bench`` with these ``settings``; meant for a new process."""
    return getattr(Bench(*settings), part)()


def compare(options: argparse.Namespace, model: str) -> dict[str, dict[str, Turns]]:
    """Measure everything for one model; return the turns by part and by "reference" or the program's precision."""
    found: dict[str, dict[str, Turns]] = {part: defaultdict(list) for part in options.parts}
    for turn in range(options.turns):
        for part in options.parts:
            precisions = options.precisions if part in ("matmul", "micro_step", "evaluation") else options.precisions[:1]
            for name in precisions if part in ("matmul", "start_up") else ["reference", *precisions]:
                print(f"UNITER-{model}, turn {turn + 1}: {part}, {name}", file=sys.stderr)
                found[part][name].append(in_new_process(measure, part, options, model, name, time.time()))
    return found


def best(turns: Turns, name: str) -> float:
    """Return the highest of rates, the lowest of seconds and bytes."""
    return (max if name.endswith("/s") or name == "flops" else min)(turn[name] for turn in turns)


def table(model: str, found: dict[str, dict[str, Turns]]) -> str:
    """Format the best of each number, with its ratio to the reference and its share of the peak."""
    lines = [f"UNITER-{model}"]
    for part, runs in found.items():
        for name, turns in runs.items():
            lines.append(f"  {part}, {name}")
            for key in turns[0]:
                value = best(turns, key)
                if key == "flops":
                    text = f"{value / 1e12:.3f} TFLOP/s"
                    if part != "matmul" and name in found.get("matmul", {}):
                        text += f" ({value / best(found['matmul'][name], key):.0%} of the peak)"
                else:
                    text = f"{value / 1e6:,.0f} MB" if key.endswith("bytes") else f"{value:,.{0 if value >= 1000 else 2}f}"
                    if name != "reference" and key in runs.get("reference", [{}])[0]:
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
    arguments_used = {key: value for key, value in vars(options).items() if key != "json"}
    results = {"machine": provenance() | {"device": describe(device)}, "arguments": arguments_used}
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

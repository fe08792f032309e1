"""What one process of the benchmark measures: parts of the program's work, or the reference's, on random data."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import fastest_product, memory_peak, start_memory_peak
from benchmarks.reference import Reference, decode, read, to
from data.datasets import Anchor, HardNegativeDataset
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import RetrievalSplit, read_pairs
from evaluation.scoring import score_matrix
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.iais import REGULARISERS
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import TrainOptions
from optim.trainer import Trainer
from utils.distributed import SingleProcess
from utils.precision import Precision, choose_device, choose_precision
from utils.provenance import ROOT

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
        self.compute = ComputeSettings(precision, chunk, checkpointing=arguments.checkpointing, prepare=packed_for_inference)
        data = Path(arguments.data)
        self.source = RetrievalSplit(str(data / "texts.db"), str(data / "images"), self.config.input_limits)

    def model(self) -> RetrievalModel:
        """Random weights, the same in each process."""
        torch.manual_seed(0)
        return RetrievalModel(self.config).to(self.device)

    def start_up(self) -> Measured:
        """Seconds from nothing to the first score: imports, databases, a model of random weights, one pair."""
        self.score_few(self.model())
        return {"seconds": time.time() - self.arguments.started}

    def score_few(self, model: RetrievalModel) -> None:
        """One pair by the program, which also makes a library ready that is loaded at its first use."""
        batch = read_pairs([(self.source, self.source.text_db.ids[0], self.source.image_names[0])]).to(self.device)
        with torch.no_grad():
            model.eval()(batch, self.compute).scores.tolist()

    def matmul(self) -> Measured:
        """The machine's peak in this arithmetic."""
        return {"flops": fastest_product(self.compute.precision.dtype, self.device)}

    def loader(self) -> Measured:
        """Images a second, collected for text-anchored halves, and records a second."""
        wanted, halves = self.arguments.candidates, self.arguments.halves
        names = self.source.image_names[:]
        numbers = range(1, 2 * halves, 2)
        if self.arguments.reference:
            task = self.task(halves)
            pairs = [[(text, name) for _, text, name in task.candidates("text", step)] for step in range(halves)]
            seconds = self.clock(lambda: [read(self.source, of_half) and None for of_half in pairs])
            decoding = self.clock(lambda: [decode(self.source.image_db._store.get(name)) and None for name in names])
            return {"images/s": wanted * halves / seconds, "decoded images/s": len(names) / decoding}
        found: Measured = {}
        cache = ImageCache.of([self.source], Loader(self.device), 2**40)
        assert cache is not None
        ways = [("images/s", 0, False), (f"by {self.arguments.n_workers} processes images/s", self.arguments.n_workers, False),
                ("held in memory images/s", 0, True)]  # fmt: skip
        for name, processes, held in ways:
            task = self.task(1000)
            task.without_images = held
            ahead = range(1, 2 * (2 * processes + 1), 2)  # what the processes read before they are asked
            arriving = Loader(self.device, processes, pin=True)(task, [*ahead, *numbers])
            filled = map(cache.fill, arriving) if held else arriving
            for _ in ahead:
                next(filled)
            found[name] = wanted * halves / self.clock(lambda filled=filled: [None for _ in filled])
        found["decoded images/s"] = len(names) / self.clock(lambda: [self.source.image_db[name] and None for name in names])
        texts = self.source.text_db.ids[:]
        found["text records/s"] = len(texts) / self.clock(lambda: [self.source.text_db[text] for text in texts])
        return found

    def task(self, micro_steps: int, candidates: int | None = None) -> HardNegativeDataset:
        """The halves of so many micro-steps."""
        negatives = (candidates or self.arguments.candidates) - 1
        return HardNegativeDataset([self.source], negative_size=negatives, micro_steps=micro_steps)

    def micro_step(self) -> Measured:
        """Seconds of one micro-step, by half and by what is done in it, with an update, and its memory at the peak."""
        options = TrainOptions(
            train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", IAIS="singular",
            train_batch_size=1, negative_size=self.arguments.candidates - 1, hard_neg_size=HARD, num_train_steps=1000,
        )  # fmt: skip
        trainer = Trainer(self.model(), options, self.compute, SingleProcess())
        half = self.reference_half if self.arguments.reference else self.program_half
        regulariser = REGULARISERS["singular"]
        half(trainer, "image", self.task(1, HARD + 1), defaultdict(float))  # libraries are loaded at their first use
        trainer.optimizer.step()  # at learning rate 0; makes the moments
        trainer.gradient.zero()
        before = start_memory_peak(self.device)
        found: Measured = {"seconds": 0.0}
        anchors: tuple[Anchor, ...] = ("image", "text")
        for anchor in anchors:
            parts: dict[str, float] = defaultdict(float)
            REGULARISERS["singular"] = self.timed(parts, "of which IAIS", regulariser)
            half(trainer, anchor, self.task(1), parts)
            found[f"{anchor}-anchored half"] = parts
            found["seconds"] += sum(seconds for name, seconds in parts.items() if not name.startswith("of which"))
        nn.utils.clip_grad_norm_(trainer.model.parameters(), options.grad_norm)
        found["optimizer"] = self.clock(trainer.optimizer.step)
        found["seconds"] += found["optimizer"]
        peak = memory_peak(self.device)
        return found | {"peak bytes": peak, "beyond the state bytes": peak - before}

    def program_half(self, trainer: Trainer, anchor: Anchor, task: HardNegativeDataset, parts: dict[str, float]) -> None:
        """A half of ``anchor``'s kind as the program does it; reading it is not timed, since it is done ahead."""
        half, objective = task[0 if anchor == "image" else 1].to(self.device), trainer.objective
        candidates = self.timed(parts, "mining", objective.mine)(trainer.model, half, self.compute)
        loss = self.timed(parts, "hard pass", objective.loss)(trainer.model, half, self.compute, candidates)
        self.timed(parts, "backward", (loss.hinge.mean() + loss.alignment.sum()).backward)()

    def reference_half(self, trainer: Trainer, anchor: Anchor, task: HardNegativeDataset, parts: dict[str, float]) -> None:
        """The same by the reference."""
        reference, way = Reference(trainer.model), "V" if anchor == "image" else "L"
        pairs = [(text, name) for _, text, name in task.candidates(anchor, 0)]
        batch = to(read(self.source, pairs), self.device)
        candidates = self.timed(parts, "mining", reference.mine)(batch)
        loss = self.timed(parts, "hard pass", reference.loss)(batch, candidates, HARD, "singular", way)
        self.timed(parts, "backward", loss.backward)()

    def evaluation(self) -> Measured:
        """Pairs a second of some texts against all images of the database, floating-point operations a second, and memory."""
        texts = self.first_texts(self.arguments.texts)
        images, model = self.source.image_names, self.model()
        self.score_few(model)
        before = start_memory_peak(self.device)
        if self.arguments.reference:
            reference, size = Reference(model), self.arguments.candidates
            seconds = self.clock(lambda: reference.evaluate(self.source, texts, images[:], size, self.device))
        else:
            loader = Loader(self.device, self.arguments.n_workers)
            seconds = self.clock(lambda: score_matrix(model, self.source, self.compute, loader, SingleProcess()))
        regions = [len(self.source.image_db[image].boxes) for image in images]
        words = self.source.text_db.lengths + 2
        needed = sum(self.operations(int(of_text) + of_image) for of_text in words for of_image in regions)
        beyond = memory_peak(self.device) - before
        return {"pairs/s": len(texts) * len(images) / seconds, "flops": needed / seconds, "beyond the weights bytes": beyond}

    def first_texts(self, count: int) -> list[str]:
        """Leave only so many texts in the source, which go on to have all its images."""
        database, source = self.source.text_db, self.source
        database.ids = database.ids[:count]
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

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds that ``work`` takes."""
        parts: dict[str, float] = defaultdict(float)
        self.timed(parts, "", work)()
        return parts[""]

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

"""What the benchmark measures, each part in a process of its own: the program's work, or the reference's, on random data."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.machine import fastest_product, memory_peak, seconds_of, start_memory_peak, timing
from benchmarks.reference import Reference, decode, read
from benchmarks.synthetic import HARD, compute_settings, open_split, random_model, train_options
from data.datasets import Anchor, HardNegativeDataset
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import read_pairs
from evaluation.scoring import score_matrix
from model.config import UniterConfig
from model.iais import REGULARISERS
from model.retrieval import RetrievalModel
from optim.trainer import Trainer
from utils.distributed import SingleProcess
from utils.options import PrecisionName
from utils.precision import choose_device
from utils.provenance import ROOT

Measured = dict[str, Any]
Seconds = dict[str, float]


class Bench:
    """A model on the random data in ``options.data``, run by the program or by the reference.

    Names of rates end in "/s" ("flops" is one too), names of memory in "bytes"; everything else is in seconds.

    Args:
        options: those of ``run.py``.
        started: when this process was started, in ``time.time()``.
    """

    def __init__(
        self, options: argparse.Namespace, model: str, precision: PrecisionName, reference: bool, started: float
    ) -> None:
        self.options, self.reference, self.started = options, reference, started
        self.device = choose_device(options.device)
        self.config = UniterConfig.from_json(ROOT / f"config/uniter-{model}.json")
        compute = compute_settings(self.config, options.candidates, precision, self.device)
        self.compute = replace(compute, checkpointing=options.checkpointing)
        self.split = open_split(Path(options.data), self.config)

    def start_up(self) -> Measured:
        """Everything up to the first score: imports, databases, a model with random weights, one pair."""
        self.score_one_pair(self.model())
        return {"seconds": time.time() - self.started}

    def matmul(self) -> Measured:
        """The machine's peak in this arithmetic."""
        return {"flops": fastest_product(self.compute.precision.dtype, self.device)}

    def loader(self) -> Measured:
        """Images collated for text-anchored halves, images decoded, and texts read."""
        count, images, texts = self.options.halves, self.split.image_names[:], self.split.text_db.ids[:]
        if self.reference:
            dataset = self.dataset(count)
            halves = [[pair[1:] for pair in dataset.candidates("text", step)] for step in range(count)]
            records = (decode(self.split.image_db._store.get(name)) for name in images)
            return {
                "images/s": self.options.candidates * self.rate(count, (read(self.split, half) for half in halves)),
                "decoded images/s": self.rate(len(images), records),
            }
        cache = ImageCache.of([self.split], Loader(self.device), 2**40)
        assert cache is not None
        found: Measured = {}
        workers = self.options.n_workers
        for name, n_workers, cached in (
            ("", 0, False),
            (f"by {workers} processes ", workers, False),
            ("held in memory ", 0, True),
        ):
            dataset = self.dataset(1000)
            dataset.without_images = cached
            ahead = range(1, 2 * (2 * n_workers + 1), 2)  # what the workers read before it is requested
            read_halves = Loader(self.device, n_workers, pin=True)(dataset, [*ahead, *range(1, 2 * count, 2)])
            halves = map(cache.fill, read_halves) if cached else read_halves
            for _ in ahead:
                next(halves)
            found[f"{name}images/s"] = self.options.candidates * self.rate(count, halves)
        found["decoded images/s"] = self.rate(len(images), (self.split.image_db[name] for name in images))
        found["text records/s"] = self.rate(len(texts), (self.split.text_db[text] for text in texts))
        return found

    def micro_step(self) -> Measured:
        """One micro-step, by half and by step, with an update, and the peak of its memory."""
        options = train_options(self.options.candidates - 1)
        trainer = Trainer(self.model(), options, self.compute, SingleProcess())
        half = self.reference_half if self.reference else self.program_half
        regulariser = REGULARISERS["singular"]
        half(trainer, "image", self.dataset(1, HARD + 1), defaultdict(float))  # loads libraries at their first use
        trainer.optimizer.step()  # at learning rate 0; creates the moments
        trainer.gradient.zero()
        before = start_memory_peak(self.device)
        found: Measured = {"seconds": 0.0}
        anchors: tuple[Anchor, ...] = ("image", "text")
        for anchor in anchors:
            seconds = found[f"{anchor}-anchored half"] = defaultdict(float)
            with patch.dict(REGULARISERS, singular=timing(seconds, "of which IAIS", regulariser, self.device)):
                half(trainer, anchor, self.dataset(1), seconds)
            found["seconds"] += sum(value for name, value in seconds.items() if not name.startswith("of which"))
        nn.utils.clip_grad_norm_(trainer.model.parameters(), options.grad_norm)
        found["optimizer"] = seconds_of(trainer.optimizer.step, self.device)
        found["seconds"] += found["optimizer"]
        peak = memory_peak(self.device)
        return found | {"peak bytes": peak, "beyond the state bytes": peak - before}

    def evaluation(self) -> Measured:
        """Pairs of the first texts and all images, the encoder's floating-point operations, and memory."""
        images, model = self.split.image_names, self.model()
        self.keep_texts(self.options.texts)
        self.score_one_pair(model)
        before = start_memory_peak(self.device)
        if self.reference:
            reference, texts = Reference(model), list(self.split.text_db.ids)
            run = partial(reference.evaluate, self.split, texts, images[:], self.options.candidates, self.device)
        else:
            loader = Loader(self.device, self.options.n_workers)
            run = partial(score_matrix, model, self.split, self.compute, loader, SingleProcess())
        seconds = seconds_of(run, self.device)
        beyond = memory_peak(self.device) - before
        regions = [len(self.split.image_db[image].boxes) for image in images]
        words = (self.split.text_db.lengths + 2).tolist()
        operations = sum(self.operations(text + image) for text in words for image in regions)
        pairs = len(words) * len(regions)
        return {"pairs/s": pairs / seconds, "flops": operations / seconds, "beyond the weights bytes": beyond}

    def model(self) -> RetrievalModel:
        return random_model(self.config, self.device)

    def dataset(self, micro_steps: int, candidates: int | None = None) -> HardNegativeDataset:
        """The halves of ``micro_steps`` micro-steps."""
        negatives = (candidates or self.options.candidates) - 1
        return HardNegativeDataset([self.split], negative_size=negatives, micro_steps=micro_steps)

    def score_one_pair(self, model: RetrievalModel) -> None:
        """Score with the program, which also loads the libraries that are loaded at their first use."""
        batch = read_pairs([(self.split, self.split.text_db.ids[0], self.split.image_names[0])]).to(self.device)
        with torch.no_grad():
            model.eval()(batch, self.compute).scores.tolist()

    def keep_texts(self, count: int) -> None:
        """Leave only the first ``count`` texts in the split, with all its images."""
        database = self.split.text_db
        database.ids, database.lengths = database.ids[:count], database.lengths[:count]
        database.image_of = self.split.image_of = self.split.image_of[:count]

    def program_half(self, trainer: Trainer, anchor: Anchor, dataset: HardNegativeDataset, seconds: Seconds) -> None:
        """Run one half as the program does; reading it is not timed, since workers read ahead."""
        half, objective = dataset[0 if anchor == "image" else 1].to(self.device), trainer.objective
        candidates = timing(seconds, "mining", objective.mine, self.device)(trainer.model, half, self.compute)
        loss = timing(seconds, "hard pass", objective.loss, self.device)(trainer.model, half, self.compute, candidates)
        timing(seconds, "backward", (loss.hinge.mean() + loss.alignment.sum()).backward, self.device)()

    def reference_half(self, trainer: Trainer, anchor: Anchor, dataset: HardNegativeDataset, seconds: Seconds) -> None:
        """Run the same half by the reference."""
        reference, modality = Reference(trainer.model), "V" if anchor == "image" else "L"
        batch = read(self.split, [pair[1:] for pair in dataset.candidates(anchor, 0)]).to(self.device)
        candidates = timing(seconds, "mining", reference.mine, self.device)(batch)
        loss = timing(seconds, "hard pass", reference.loss, self.device)(batch, candidates, HARD, "singular", modality)
        timing(seconds, "backward", loss.backward, self.device)()

    def operations(self, length: int) -> float:
        """Floating-point operations of the encoder for a pair of ``length`` tokens if its last layer computes [CLS] alone."""
        c = self.config
        projections, feed_forward = 4 * c.hidden_size**2, 2 * c.hidden_size * c.intermediate_size
        whole = 2 * length * (projections + feed_forward) + 4 * length**2 * c.hidden_size
        last = 2 * length * 2 * c.hidden_size**2 + 2 * (projections / 2 + feed_forward) + 4 * length * c.hidden_size
        return (c.num_hidden_layers - 1) * whole + last

    def rate(self, count: int, items: Iterable[object]) -> float:
        """Items per second at which ``count`` items are produced."""
        return count / seconds_of(lambda: deque(items, maxlen=0), self.device)

"""What the benchmark measures, each part in a process of its own: the program's work, or the reference's, on random data."""

from __future__ import annotations

import argparse
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
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

HALVES, WORKERS = 10, 2  # text-anchored halves that the loader collates; loader workers of the program
Measured = dict[str, float]
Timed = Callable[[str], AbstractContextManager[object]]


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
        self.candidates, self.texts, self.reference, self.started = options.candidates, options.texts, reference, started
        self.device = choose_device(options.device)
        self.config = UniterConfig.from_json(ROOT / f"config/uniter-{model}.json")
        self.compute = compute_settings(self.config, options.candidates, precision, self.device)
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
        dataset = self._dataset(1000)
        if self.reference:
            halves = [[pair[1:] for pair in dataset.candidates("text", step)] for step in range(HALVES)]
            records = (decode(self.split.image_db._store.get(name)) for name in images)
            return {
                "images/s": self.candidates * self._rate(HALVES, (read(self.split, half) for half in halves)),
                "decoded images/s": self._rate(len(images), records),
            }
        cache = ImageCache.of([self.split], Loader(self.device), 2**40)
        assert cache is not None
        found: Measured = {}
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
        trainer = Trainer(random_model(self.config, self.device), options, self.compute, SingleProcess())
        seconds: Counter[str] = Counter()
        timed = partial(timing, seconds, device=self.device)
        self._half(trainer, "image", self._dataset(1, HARD + 1), timed)  # loads libraries at their first use
        trainer.optimizer.step()  # at learning rate 0; creates the moments
        trainer.gradient.zero()
        seconds.clear()
        before = start_memory_peak(self.device)
        anchors: tuple[Anchor, ...] = ("image", "text")
        for anchor in anchors:
            with patch.dict(REGULARISERS, singular=timed(f"{anchor}-anchored, of which IAIS")(REGULARISERS["singular"])):
                self._half(trainer, anchor, self._dataset(1), timed)
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
        operations = sum(map(self._operations, lengths))
        return {"pairs/s": len(lengths) / seconds, "flops": operations / seconds, "beyond the weights bytes": beyond}

    def _dataset(self, micro_steps: int, candidates: int | None = None) -> HardNegativeDataset:
        negatives = (candidates or self.candidates) - 1
        return HardNegativeDataset([self.split], negative_size=negatives, micro_steps=micro_steps)

    def _score_one_pair(self, model: RetrievalModel) -> None:
        """Score with the program, which also loads the libraries that are loaded at their first use."""
        batch = read_pairs([(self.split, self.split.text_db.ids[0], self.split.image_names[0])]).to(self.device)
        with torch.no_grad():
            model.eval()(batch, self.compute).scores.tolist()

    def _half(self, trainer: Trainer, anchor: Anchor, dataset: HardNegativeDataset, timed: Timed) -> None:
        """Run one half; reading it is not timed, since workers read ahead."""
        if self.reference:
            reference, modality = Reference(trainer.model), "V" if anchor == "image" else "L"
            batch = read(self.split, [pair[1:] for pair in dataset.candidates(anchor, 0)]).to(self.device)
            mine = partial(reference.mine, batch)
            loss = partial(reference.loss, batch, hard=HARD, regulariser="singular", modality=modality)
        else:
            half = dataset[0 if anchor == "image" else 1].to(self.device)
            mine, loss = (
                partial(method, trainer.model, half, self.compute)
                for method in (trainer.objective.mine, trainer.objective.loss)
            )
        with timed(f"{anchor}-anchored mining"):
            candidates = mine()
        with timed(f"{anchor}-anchored hard pass"):
            terms = loss(candidates)
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

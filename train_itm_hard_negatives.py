#!/usr/bin/env python
"""Fine-tune UNITER for image-text retrieval with online hard negatives, with or without IAIS.

python train_itm_hard_negatives.py --config config/train-itm-flickr-base-8gpu-hn.json --IAIS singular
horovodrun -np 8 python train_itm_hard_negatives.py …    (or torchrun --nproc_per_node 8 train_itm_hard_negatives.py …)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch

from data.batch import AnchorBatch
from data.datasets import HardNegativeDataset, read_neighbours
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.recall import ranks, recalls, sampled_recalls, table
from evaluation.scoring import sampled_candidates, score_matrix
from model.checkpoint import load_checkpoint
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import TrainOptions
from optim.progress import Progress
from optim.run_folder import RunFolder, recipe_of
from optim.trainer import Trainer, UpdateTerms
from utils.distributed import ProcessGroup, connect
from utils.errors import InputError, Interrupted, RankLost, one_line_errors
from utils.logging import log_to_screen, progress_bar
from utils.options import parse_options
from utils.precision import Precision, choose_device, choose_precision
from utils.signals import Stop

LOGGER = logging.getLogger("train")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → data → model → loop → best checkpoint, evaluated; the same on every worker."""
    with ExitStack() as stack:
        group = stack.enter_context(connect())
        stop = stack.enter_context(Stop())
        log_to_screen(group.rank)
        with group.raise_on_all_ranks():
            options = parse_options(TrainOptions, argv, __doc__ or "")
            torch.manual_seed(options.seed)
            device = choose_device(options.device, group.local_rank, group.local_size)
            precision = Precision(choose_precision(options.precision, options.fp16, device), device)
            loader = Loader(device, options.n_workers, options.pin_mem)
            config = UniterConfig.from_json(options.model_config).with_dropout(options.dropout)
            mining = choose_precision(options.mining_precision or precision.name, False, device, "mining_precision")
            if options.checkpointing and device.type == "mps":
                raise InputError("checkpointing on mps, where torch cannot repeat dropout, expected device cpu or cuda")
            compute = ComputeSettings(
                precision,
                ChunkSize.for_device(device, config.intermediate_size, options.inf_minibatch_size),
                mining=Precision(mining, device),
                checkpointing=options.checkpointing,
                prepare=packed_for_inference,
            )

            def source(text_db: str, image_db: str, max_txt_len: int = -1) -> RetrievalSplit:
                return stack.enter_context(
                    RetrievalSplit(
                        text_db,
                        image_db,
                        config.input_limits,
                        options.box_rule,
                        compressed=options.compressed_db,
                        max_txt_len=max_txt_len,
                    )
                )

            pairs_of_paths = zip(options.train_txt_dbs, options.train_img_dbs, strict=True)
            training = [source(*paths, options.max_txt_len) for paths in pairs_of_paths]
            val = source(options.val_txt_db, options.val_img_db)
            test = source(options.test_txt_db, options.test_img_db) if options.test_txt_db else None
            micro_steps = options.micro_steps(group.world_size)
            task = HardNegativeDataset(
                training,
                negative_size=options.negative_size,
                micro_steps=options.num_train_steps * micro_steps,
                micro_steps_per_pass=options.micro_steps_per_pass,
                seed=options.seed,
                rank=group.rank,
                world_size=group.world_size,
                neighbours=read_neighbours(options.neighbours) if options.neighbours else {},
            )
            model = RetrievalModel(config)
            origin = (
                load_checkpoint(model, options.checkpoint) if options.checkpoint else "nowhere: random, no checkpoint given"
            )
            model.to(device)
            trainer = Trainer(model, options, compute, group)
            recipe = recipe_of(options, training, val, config, compute)
        group.check_same(recipe)
        with group.raise_on_all_ranks():
            threads = torch.get_num_threads() if device.type == "cpu" else None
            machine = {"workers": group.world_size, "device": device.type, "threads": threads}
            run = stack.enter_context(RunFolder(options, recipe, machine, config, group))

        progress = resumed(trainer, run, group)
        group.broadcast(model.state_dict().values())
        if not progress.updates:
            LOGGER.info("weights from %s", origin)
        LOGGER.info("%s; %s on %s; %d texts in training", group.launcher, precision.name, device, sum(map(len, task.texts)))
        LOGGER.info(
            "an update is %d micro-steps, %d on each worker; the loss terms weigh as with %d on each",
            micro_steps * group.world_size,
            micro_steps,
            options.train_batch_size,
        )
        cache = None
        with group.raise_on_all_ranks():
            cache = ImageCache.of(training, loader, options.image_cache * 2**30)
        task.without_images = cache is not None
        read = loader(task, task.anchor_batches_after(progress.updates * micro_steps))
        halves = stoppable(map(cache.fill, read) if cache else read, stop)

        def measure() -> dict[str, float]:
            return group.share(validate(model, val, compute, loader, group, options))

        train(trainer, halves, measure, progress, run, stop)
        results = {"best_update": progress.best_update, "validation": progress.best}
        if test is not None:
            run.load_best(model)
            group.broadcast(model.state_dict().values())
            if scored := score_matrix(model, test, compute, loader, group):
                results["test"] = recalls(ranks(scored.scores, test.image_of))
                run.scalars("test", results["test"], progress.updates)
                LOGGER.info("test, with the best checkpoint in validation:\n%s", table({"test": results["test"]}))
        run.save_results(results)


def resumed(trainer: Trainer, run: RunFolder, group: ProcessGroup) -> Progress:
    """How far the run is that goes on, its state restored on every worker; or the beginning of a new one."""
    state = group.share(run.take_state())
    if state is None:
        return Progress()
    trainer.restore(state)
    return Progress(**state["progress"])


def train(
    trainer: Trainer,
    halves: Iterator[AnchorBatch],
    measure: Callable[[], dict[str, float]],
    progress: Progress,
    run: RunFolder,
    stop: Stop,
) -> None:
    """Update, validate and save until nothing is left to do; a signal or a lost worker saves what there is and ends it.

    Raises:
        Interrupted: by SIGTERM or Ctrl-C.
        RankLost: another worker has gone.
    """
    options = trainer.options
    with progress_bar(trainer.group.is_main, total=options.num_train_steps, initial=progress.updates, desc="training") as bar:
        try:
            while not progress.finished(options):
                if progress.validation_due(options):
                    run.save_weights("last", trainer.model)
                    measured = measure()
                    with stop.deferred():
                        if progress.validated_with(measured):
                            run.save_best(trainer.model)
                        run.scalars("val", measured, progress.updates)
                    in_percent = "  ".join(f"{name} {100 * value:.2f}" for name, value in measured.items())
                    LOGGER.info("after %d updates, validation: %s", progress.updates, in_percent)
                else:
                    started = time.perf_counter()
                    with stop.deferred():
                        terms = trainer.update(halves, progress.updates)
                        progress.updated(terms.skipped)
                        shown = describe_update(terms, trainer, progress, time.perf_counter() - started)
                        run.scalars("train", shown, progress.updates)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
                    bar.update()
                if progress.checkpoint_due(options):
                    with stop.deferred():
                        run.save(progress, trainer.state())
        except (Interrupted, RankLost):
            if trainer.state_is_consistent:
                with stop.deferred():
                    run.save(progress, trainer.state())
            raise


def stoppable(halves: Iterator[AnchorBatch], stop: Stop) -> Iterator[AnchorBatch]:
    """The same halves; where a signal has arrived, ends between two micro-steps by raising ``Interrupted``."""
    for half in halves:
        if half.anchor == "image":
            stop.check()
        yield half


def describe_update(terms: UpdateTerms, trainer: Trainer, progress: Progress, seconds: float) -> dict[str, float]:
    """What the progress bar and TensorBoard show: mean hinge, and mean alignment as it enters the loss, of the halves."""
    shown = {"rank": float(terms.ranking.mean()) * trainer.micro_steps}
    if trainer.options.IAIS:
        shown |= {"iais": float(terms.alignment.mean()), "lambda": terms.weight}
    if terms.skipped:
        scale = trainer.compute.precision.scaler.get_scale()
        LOGGER.warning("update %d skipped: its gradient is not finite; the loss scale is now %g", progress.updates, scale)
    if progress.skipped:
        shown["skipped"] = progress.skipped
    examples = 2 * trainer.micro_steps * trainer.group.world_size
    return shown | {"lr": terms.learning_rate, "grad_norm": terms.grad_norm, "ex/s": examples / seconds}


def validate(
    model: RetrievalModel,
    source: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    group: ProcessGroup,
    options: TrainOptions,
) -> dict[str, float] | None:
    """Full validation, or quick: each text's image among ``inf_minibatch_size`` images, the same for every run and seed.

    Worker 0 has the result, the others None.
    """
    candidates = None if options.full_val else sampled_candidates(source, options.inf_minibatch_size)
    scored = score_matrix(model, source, compute, loader, group, candidates=candidates)
    if scored is None:
        return None
    found = ranks(scored.scores, source.image_of)
    return recalls(found) if options.full_val else sampled_recalls(found)


if __name__ == "__main__":
    main(sys.argv[1:])

#!/usr/bin/env python
"""Fine-tune UNITER for image-text retrieval with online hard negatives, with or without IAIS.

python train_itm_hard_negatives.py --config config/train-itm-flickr-base-8gpu-hn.json --IAIS singular
horovodrun -np 8 python train_itm_hard_negatives.py …    (or torchrun --nproc_per_node 8 train_itm_hard_negatives.py …)
"""

from __future__ import annotations

from utils.startup import one_line_errors  # isort: split

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import torch

from data.batch import AnchorBatch
from data.checks import check_vocabularies
from data.datasets import HardNegativeDataset, read_neighbours
from data.image_cache import ImageCache
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.candidates import sampled_candidates
from evaluation.recall import ranks, recalls, sampled_recalls, table
from evaluation.scoring import score_matrix
from model.checkpoint import load_checkpoint
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference, recompute_in_backward
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import TrainOptions
from optim.run_folder import RunFolder, recipe_of
from optim.trainer import Trainer
from utils.distributed import ProcessGroup, connect
from utils.errors import InputError, Interrupted, RankLost, counted
from utils.files import save_json
from utils.logging import log_to_screen
from utils.options import parse_options
from utils.parallel import WorkerFailed
from utils.precision import Precision, choose_device, choose_precision
from utils.signals import StopSignal

LOGGER = logging.getLogger("train")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → data → model → training → test of the best checkpoint; the same on every rank."""
    with ExitStack() as stack:
        group = stack.enter_context(connect())
        stop = stack.enter_context(StopSignal())
        log_to_screen(group.rank)
        with group.raise_on_all_ranks():
            options = parse_options(TrainOptions, argv, __doc__ or "")
            torch.manual_seed(options.seed)
            config = UniterConfig.from_json(options.model_config).with_dropout(options.dropout)
            compute = compute_settings(options, config, group)
            device = compute.precision.device
            loader = Loader(device, options.workers, options.pin_mem)

            def open_split(txt_db: str, img_db: str, max_txt_len: int = -1) -> RetrievalSplit:
                rule, form = options.box_rule, {"compressed": options.compressed_db, "max_txt_len": max_txt_len}
                return stack.enter_context(RetrievalSplit(txt_db, img_db, config.input_limits, rule, **form))

            databases = zip(options.train_txt_dbs, options.train_img_dbs, strict=True)
            training = [open_split(*pair, options.max_txt_len) for pair in databases]
            val = open_split(options.val_txt_db, options.val_img_db)
            test = open_split(options.test_txt_db, options.test_img_db) if options.test_txt_db else None
            texts_of = [split.text_db for split in (*training, val, test) if split]
            check_vocabularies({texts.path: texts.meta for texts in texts_of}, options.checkpoint)
            dataset = HardNegativeDataset(
                training,
                negative_size=options.negative_size,
                micro_steps=options.num_train_steps * options.micro_steps(group.world_size),
                micro_steps_per_pass=options.micro_steps_per_pass,
                seed=options.seed,
                rank=group.rank,
                world_size=group.world_size,
                neighbours=read_neighbours(options.neighbours) if options.neighbours else {},
            )
            model = RetrievalModel(config)
            origin = load_checkpoint(model, options.checkpoint) if options.checkpoint else "random initialisation"
            if not compute.checkpointing:
                recompute_in_backward(model)
            trainer = Trainer(model.to(device), options, compute, group)
            recipe = recipe_of(options, training, val, config, compute)
        group.check_same(recipe)
        with group.raise_on_all_ranks():
            threads = torch.get_num_threads() if device.type == "cpu" else None
            machine = {"workers": group.world_size, "device": device.type, "threads": threads}
            run = stack.enter_context(RunFolder(options, recipe, machine, config, group))
            if group.is_main:
                save_json(run.path / "log/vocabulary.json", texts_of[0].meta)
        run.restore(trainer)
        group.broadcast(model.state_dict().values())
        if not run.progress.updates:
            LOGGER.info("weights from %s", origin)
        texts = sum(map(len, dataset.texts))
        LOGGER.info("%s; %s on %s; %s", group.launcher, compute.precision.name, device, counted(texts, "training text"))
        steps = counted(trainer.micro_steps * group.world_size, "micro-step")
        weighted = "the loss terms are weighted as with %d per rank"
        LOGGER.info(f"an update has %s, %d per rank; {weighted}", steps, trainer.micro_steps, options.train_batch_size)
        with group.raise_on_all_ranks():
            cache = ImageCache.of(training, loader, options.image_cache * 2**30)
        dataset.without_images = cache is not None
        anchors = dataset.anchor_batches_after(run.progress.updates * trainer.micro_steps)
        batches = stack.enter_context(closing(loader(dataset, anchors)))
        batches = interruptible(map(cache.fill, batches) if cache else batches, stop)

        def validate() -> dict[str, float]:
            return group.share(validation_recalls(model, val, compute, loader, group, options))

        train(trainer, batches, validate, run, stop)
        test_recalls = None
        if test is not None:
            run.load_best(model)
            if scored := score_matrix(model, test, compute, loader, group):
                test_recalls = recalls(ranks(scored.scores, test.image_of))
                LOGGER.info("test, with the checkpoint that is best in validation:\n%s", table({"test": test_recalls}))
        run.record_test(test_recalls)


def compute_settings(options: TrainOptions, config: UniterConfig, group: ProcessGroup) -> ComputeSettings:
    """Device, precisions and chunk size of this rank. Raises ``InputError`` if the machine does not support them."""
    device = choose_device(options.device, group.local_rank, group.local_size)
    if options.checkpointing and device.type == "mps":
        raise InputError("checkpointing: not supported on mps, where torch cannot repeat dropout; use device cpu or cuda")
    precision = Precision(choose_precision(options.precision, options.fp16, device), device)
    mining = choose_precision(options.mining_precision or precision.name, False, device, "mining_precision")
    return ComputeSettings(
        precision,
        ChunkSize.for_device(device, config.intermediate_size, options.inf_minibatch_size),
        mining=Precision(mining, device),
        checkpointing=options.checkpointing,
        prepare=packed_for_inference,
    )


def train(
    trainer: Trainer, batches: Iterator[AnchorBatch], validate: Callable[[], dict[str, float]], run: RunFolder, stop: StopSignal
) -> None:
    """Validate if due, otherwise update; then save if due. What the state is not to blame for saves it and ends the training.

    Raises:
        Interrupted: by SIGTERM, SIGHUP or Ctrl-C.
        RankLost: another rank has failed.
        WorkerFailed: a batch cannot be read.
    """
    try:
        while not run.finished():
            if run.validation_due():
                measured = validate()
                with stop.deferred():
                    run.record_validation(measured, trainer.model)
            else:
                with stop.deferred():
                    run.record_update(trainer.update(batches, run.progress.updates))
            with stop.deferred():
                run.save_if_due(trainer)
    except (Interrupted, RankLost, WorkerFailed):
        if trainer.state_is_consistent:
            with stop.deferred():
                run.save(trainer)
        raise


def interruptible(batches: Iterator[AnchorBatch], stop: StopSignal) -> Iterator[AnchorBatch]:
    """The same batches; a signal that arrives during the wait for one raises ``Interrupted`` there, even within an update."""
    while True:
        with stop.at_once():
            anchors = next(batches, None)
        if anchors is None:
            return
        yield anchors


def validation_recalls(
    model: RetrievalModel,
    split: RetrievalSplit,
    compute: ComputeSettings,
    loader: Loader,
    group: ProcessGroup,
    options: TrainOptions,
) -> dict[str, float] | None:
    """Full validation, or a quick one: each text's image among ``inf_minibatch_size`` images, the same for every run and seed.

    Rank 0 has the result, the others None.
    """
    candidates = None if options.full_val else sampled_candidates(split, options.inf_minibatch_size)
    scored = score_matrix(model, split, compute, loader, group, candidates=candidates)
    if scored is None:
        return None
    ranked = ranks(scored.scores, split.image_of)
    return recalls(ranked) if options.full_val else sampled_recalls(ranked)


if __name__ == "__main__":
    main(sys.argv[1:])

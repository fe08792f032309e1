#!/usr/bin/env python
"""Fine-tune UNITER for image-text retrieval with online hard negatives, with or without IAIS.

python train_itm_hard_negatives.py --config config/train-itm-flickr-base-8gpu-hn.json --IAIS singular
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Loader
from data.tasks import HardNegativeTask, PairSource
from evaluation.recall import own_pairs, recalls, sampled_recalls, table
from evaluation.score import sampled_candidates, score_matrix
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import UniterConfig
from model.packing import ChunkSize
from model.retrieval import Compute, RetrievalModel
from optim.trainer import Trainer, UpdateTerms
from utils.errors import one_line_errors
from utils.files import new_folder, save_json
from utils.logger import RunLog, log_to_screen
from utils.options import parse_options
from utils.precision import Precision, choose_device, choose_precision
from utils.provenance import save_git_state
from utils.run_options import TrainOptions

LOGGER = logging.getLogger("train")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → data → model → loop → best checkpoint, evaluated."""
    log_to_screen()
    options = parse_options(TrainOptions, argv, __doc__ or "")
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    precision = Precision(choose_precision(options.precision, options.fp16, device), device)
    compute = Compute(precision, ChunkSize.for_device(device, options.inf_minibatch_size))
    loader = Loader(device, options.n_workers, options.pin_mem)
    config = UniterConfig.from_json(options.model_config).with_dropout(options.dropout)

    with ExitStack() as stack:

        def source(text_db: str, image_db: str, max_txt_len: int = -1) -> PairSource:
            return stack.enter_context(PairSource(text_db, image_db, config, options.image_settings(), max_txt_len))

        pairs_of_paths = zip(options.train_txt_dbs, options.train_img_dbs, strict=True)
        task = HardNegativeTask(
            [source(*paths, options.max_txt_len) for paths in pairs_of_paths],
            negative_size=options.negative_size,
            micro_steps=options.num_train_steps * options.train_batch_size,
            micro_steps_per_pass=options.micro_steps_per_pass,
            seed=options.seed,
        )
        val = source(options.val_txt_db, options.val_img_db)
        test = source(options.test_txt_db, options.test_img_db) if options.test_txt_db else None

        model = RetrievalModel(config)
        origin = load_checkpoint(model, options.checkpoint) if options.checkpoint else "nowhere: random, no checkpoint given"
        model.to(device)
        trainer = Trainer(model, options, compute)

        output = new_folder(options.output_dir)
        for name in ("ckpt", "log"):
            (output / name).mkdir()
        save_json(output / "log/hps.json", options.to_dict())
        save_json(output / "log/model.json", config.to_dict())
        save_git_state(output / "log")
        log = stack.enter_context(RunLog(output / "log"))
        LOGGER.info("weights from %s", origin)
        LOGGER.info("%s on %s; %d texts in training", precision.name, device, sum(map(len, task.texts)))

        best: dict[str, Any] = {}
        bar = stack.enter_context(tqdm(total=options.num_train_steps, desc="training", dynamic_ncols=True))
        halves = loader(task)
        for update in range(1, options.num_train_steps + 1):
            started = time.perf_counter()
            terms = trainer.update(halves, update - 1)
            shown = describe_update(terms, options) | {"ex/s": 2 * options.train_batch_size / (time.perf_counter() - started)}
            log.scalars({f"train/{name}": value for name, value in shown.items()}, update)
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            bar.update()
            if update % options.valid_steps == 0 or update == options.num_train_steps:
                save_checkpoint(output / "ckpt/model_last.pt", model)
                measured = validate(model, val, compute, loader, options)
                log.scalars({f"val/{name}": value for name, value in measured.items()}, update)
                recalls_in_percent = "  ".join(f"{name} {100 * value:.2f}" for name, value in measured.items())
                LOGGER.info("after %d updates, validation: %s", update, recalls_in_percent)
                if not best or measured["r_mean"] > best["validation"]["r_mean"]:
                    best = {"best_update": update, "validation": measured}
                    save_checkpoint(output / "ckpt/model_best.pt", model)
        if test is not None:
            load_checkpoint(model, output / "ckpt/model_best.pt")
            scored = score_matrix(model, test, compute, loader)
            best["test"] = recalls(scored.scores, own_pairs(scored.text_ids, scored.image_names, test.text_db.image_of))
            log.scalars({f"test/{name}": value for name, value in best["test"].items()}, options.num_train_steps)
            LOGGER.info("test, with the best checkpoint in validation:\n%s", table({"test": best["test"]}))
        save_json(output / "log/results.json", best)


def describe_update(terms: UpdateTerms, options: TrainOptions) -> dict[str, float]:
    """What the progress bar and TensorBoard show: mean hinge, and mean alignment as it enters the loss, of the halves."""
    shown = {"rank": float(terms.ranking.mean()) * options.train_batch_size}
    if options.IAIS:
        shown |= {"iais": float(terms.alignment.mean()), "lambda": terms.weight}
    return shown | {"lr": terms.learning_rate, "grad_norm": terms.grad_norm}


def validate(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader, options: TrainOptions
) -> dict[str, float]:
    """Full validation, or quick: each text's image among ``inf_minibatch_size`` images, the same for every run and seed."""
    wanted = None if options.full_val else sampled_candidates(source, options.inf_minibatch_size)
    scored = score_matrix(model, source, compute, loader, wanted=wanted)
    own = own_pairs(scored.text_ids, scored.image_names, source.text_db.image_of)
    return (recalls if options.full_val else sampled_recalls)(scored.scores, own)


if __name__ == "__main__":
    main(sys.argv[1:])

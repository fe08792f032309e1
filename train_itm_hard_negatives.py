#!/usr/bin/env python
"""Fine-tune UNITER for image-text retrieval with online hard negatives, with or without IAIS.

python train_itm_hard_negatives.py --config config/train-itm-flickr-base-8gpu-hn.json --IAIS singular
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Loader
from data.tasks import HardNegativeTask, PairSource
from evaluation.recall import own_pairs, recalls, sampled_recalls, table
from evaluation.score import sampled_candidates, score_matrix
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import UniterConfig
from model.objective import Objective, layer_numbers
from model.packing import ChunkSize
from model.retrieval import Compute, RetrievalModel
from optim.build import build_optimiser
from optim.schedule import iais_weight, learning_rate
from optim.update import Updater
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
    images = options.image_settings()
    train = [PairSource(*paths, config, images) for paths in zip(options.train_txt_dbs, options.train_img_dbs, strict=True)]
    val = PairSource(options.val_txt_db, options.val_img_db, config, images)
    test = PairSource(options.test_txt_db, options.test_img_db, config, images) if options.test_txt_db else None
    passes = options.train_batch_size // options.micro_steps_per_pass
    task = HardNegativeTask(
        train,
        negative_size=options.negative_size,
        micro_steps=options.num_train_steps * options.train_batch_size,
        micro_steps_per_pass=options.micro_steps_per_pass,
        max_txt_len=options.max_txt_len,
        seed=options.seed,
    )

    model = RetrievalModel(config)
    origin = str(load_checkpoint(model, options.checkpoint)) if options.checkpoint else "random weights: no checkpoint given"
    model.to(device)
    objective = Objective(
        hard_neg_size=options.hard_neg_size,
        margin=options.margin,
        mining=options.mining,
        regulariser=options.IAIS,
        layers=layer_numbers(options.iais_layers, config.num_hidden_layers),
        modality=options.iais_modality,
    )
    updater = Updater(
        model,
        build_optimiser(model, options.optim, options.betas, options.weight_decay),
        lambda update: learning_rate(update, options.learning_rate, options.warmup_steps, options.num_train_steps),
        options.grad_norm,
        precision,
    )

    output = new_folder(options.output_dir)
    for name in ("ckpt", "log"):
        (output / name).mkdir()
    save_json(output / "log/hps.json", options.to_dict())
    save_json(output / "log/model.json", config.to_dict())
    save_git_state(output / "log")
    results: dict[str, Any] = {"best_update": 0, "validation": {"r_mean": -1.0}}
    with RunLog(output / "log") as log, tqdm(total=options.num_train_steps, desc="training", dynamic_ncols=True) as bar:
        LOGGER.info("weights from %s", origin)
        LOGGER.info("%s on %s; %d texts in training", precision.name, device, sum(map(len, task.texts)))
        halves = loader(task)
        for update in range(options.num_train_steps):
            started = time.perf_counter()
            weight = options.iais_weight * iais_weight(update, options.num_train_steps, options.iais_schedule)
            divisor = options.train_batch_size if options.iais_divide else 1
            ranking = alignment = torch.zeros((), device=device)
            for _ in range(2 * passes):
                terms = objective(model, next(halves), compute)
                loss = terms.hinge.mean(dim=1).sum() / options.train_batch_size + weight * terms.alignment.sum() / divisor
                updater.backward(loss)
                ranking = ranking + terms.hinge.detach().mean(dim=1).sum()
                alignment = alignment + terms.alignment.detach().sum()
            norm = updater.step(update)

            anchors = 2 * options.train_batch_size
            rate = updater.learning_rate(update + 1)
            shown = {"rank": float(ranking) / anchors, "lr": rate, "grad_norm": norm}
            if options.IAIS:
                shown |= {"iais": float(alignment) / anchors, "lambda": weight}
            shown["ex/s"] = anchors / (time.perf_counter() - started)
            log.scalars({f"train/{name}": value for name, value in shown.items()}, update + 1)
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
            bar.update()

            if (update + 1) % options.valid_steps == 0 or update + 1 == options.num_train_steps:
                measured = evaluate(model, val, compute, loader, options)
                log.scalars({f"val/{name}": value for name, value in measured.items()}, update + 1)
                LOGGER.info("after %d updates, validation: %s", update + 1, describe(measured))
                save_checkpoint(output / "ckpt/model_last.pt", model)
                if measured["r_mean"] > results["validation"]["r_mean"]:
                    results = {"best_update": update + 1, "validation": measured}
                    save_checkpoint(output / "ckpt/model_best.pt", model)

        load_checkpoint(model, output / "ckpt/model_best.pt")
        if test is not None:
            scored = score_matrix(model, test, compute, loader)
            measured = recalls(scored.scores, own_pairs(scored.text_ids, scored.image_names, test.text_db.image_of))
            log.scalars({f"test/{name}": value for name, value in measured.items()}, options.num_train_steps)
            LOGGER.info("test, with the best checkpoint in validation:\n%s", table({"test": measured}))
            results["test"] = measured
        save_json(output / "log/results.json", results)


def evaluate(
    model: RetrievalModel, source: PairSource, compute: Compute, loader: Loader, options: TrainOptions
) -> dict[str, float]:
    """Full validation, or quick: each text's image among ``inf_minibatch_size`` images, the same at every validation."""
    wanted = None if options.full_val else sampled_candidates(source, options.inf_minibatch_size, options.seed)
    scored = score_matrix(model, source, compute, loader, wanted=wanted)
    own = own_pairs(scored.text_ids, scored.image_names, source.text_db.image_of)
    return (recalls if options.full_val else sampled_recalls)(scored.scores, own)


def describe(measured: dict[str, float]) -> str:
    """One line of recalls in percent."""
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in measured.items())


if __name__ == "__main__":
    main(sys.argv[1:])

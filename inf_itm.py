#!/usr/bin/env python
"""Score every text of a split with every image, or only listed pairs, and report recall@1/5/10 in both directions.

python inf_itm.py --txt_db DB --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR [--report] [--candidates FILE]
"""

from __future__ import annotations

import utils  # isort: skip  # noqa: F401 - for the message if a package is missing
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.checks import check_vocabularies
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation import recall
from evaluation.alignment import alignment_of_positives
from evaluation.analysis import analyse, summary_table
from evaluation.candidates import read_candidates
from evaluation.options import FROM_TRAINING, NO_PICTURES, InferenceOptions
from evaluation.scoring import partial_scores, score_matrix
from model.checkpoint import load_ranking_model
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings
from utils.distributed import connect
from utils.errors import InputError, one_line_errors
from utils.files import output_folder, save_json, save_npz, sha256
from utils.logging import log_to_screen
from utils.options import parse_options
from utils.precision import Precision, choose_device, choose_precision
from utils.provenance import provenance

LOGGER = logging.getLogger("inference")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → data → checkpoint → scores → recall@K. Runs on every rank; rank 0 writes."""
    started = time.perf_counter()
    with ExitStack() as stack:
        group = stack.enter_context(connect())
        log_to_screen(group.rank)
        with group.raise_on_all_ranks():
            options = parse_options(InferenceOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
            device = choose_device(options.device, group.local_rank, group.local_size)
            precision = Precision(choose_precision(options.precision, options.fp16, device), device)
            loader = Loader(device, options.n_workers, options.pin_mem)
            config = UniterConfig.from_json(options.architecture)
            chunk = ChunkSize.for_device(device, config.intermediate_size, options.batch_size)
            compute = ComputeSettings(precision, chunk, prepare=packed_for_inference)
            model, loaded = load_ranking_model(options.checkpoint, config)
            model.to(device)
            limits, compressed = config.input_limits, options.compressed_db
            split = RetrievalSplit(options.txt_db, options.img_db, limits, options.box_rule, compressed=compressed)
            check_vocabularies({options.txt_db: stack.enter_context(split).text_db.meta}, options.checkpoint)
            text_ids, image_names = split.text_db.ids, split.image_names
            candidates = read_candidates(options.candidates, text_ids, image_names) if options.candidates else None
            origin = {
                "model_config": config.to_dict(),
                "candidates": candidates and candidates.fingerprint(),
                "precision": f"{precision.name} on {device.type}",
                **split.fingerprint(),
            }
        group.check_same(origin)
        group.broadcast(model.state_dict().values())
        LOGGER.info("weights from %s", loaded)
        LOGGER.info("%s; %s on %s", group.launcher, precision.name, device)
        output, partial = Path(options.output_dir), None
        with group.raise_on_all_ranks():
            if group.is_main:
                check_report(options)
                stack.enter_context(output_folder(output))
                origin["checkpoint"] = sha256(options.checkpoint)
                shape = len(text_ids), len(image_names)
                partial = stack.enter_context(partial_scores(output, shape, origin, candidates))

        scored = score_matrix(model, split, compute, loader, group, candidates=candidates, into=partial)
        alignment = alignment_of_positives(model, split, compute, loader, group)
        if scored is None:
            return
        save_npz(
            output / "scores.npz", scores=scored.scores, txt_ids=np.array(list(text_ids)), img_ids=np.array(list(image_names))
        )
        ranks = recall.ranks(scored.scores, split.image_of)
        recalls, as_published = recall.recalls(ranks), recall.as_published(ranks)
        analysis = analyse(ranks, split.image_of, split.text_db.lengths, scored.regions)
        counts = {"texts": len(text_ids), "images": len(image_names), "pairs": scored.scores.size}
        results = {
            **recalls,
            "as_published": as_published,
            "alignment": alignment,
            "analysis": analysis,
            "counts": counts if candidates is None else counts | candidates.counts(split.image_of),
            "ties": ranks.ties,
            "seconds": time.perf_counter() - started,
            "provenance": {
                "options": asdict(options),
                "device": str(device),
                "precision": precision.name,
                "workers": group.world_size,
                "ranking_head": loaded.head,
                "checkpoint_sha256": origin["checkpoint"],
                "image_db": split.image_db.describe(),
                **provenance(),
            },
        }
        save_json(output / "scores.json", results)
        print(recall.table({Path(options.txt_db).name: recalls, "counted as published": as_published}))
        if candidates is not None:
            print(candidates.summary(split.image_of))
        print(f"\n{summary_table(analysis)}")
        LOGGER.info("wrote %s and %s", output / "scores.json", output / "scores.npz")
    if options.report:
        from evaluation.report.page import write_report  # takes a second to import, and is rarely needed

        write_report([output], output / "report", Path(options.report) if options.report != NO_PICTURES else None)
        LOGGER.info("wrote %s", output / "report/index.html")


def check_report(options: InferenceOptions) -> None:
    """Raise ``InputError`` before scoring starts if the report cannot be written."""
    report = Path(options.output_dir) / "report"
    if options.report and os.path.lexists(report):
        raise InputError(f"{report}: already exists; remove it or choose another output_dir")
    if options.report not in (None, NO_PICTURES) and not Path(options.report or "").is_dir():
        raise InputError(f"report {options.report}: no such folder, expected a folder of pictures")


if __name__ == "__main__":
    main(sys.argv[1:])

#!/usr/bin/env python
"""Score every text of a split against every image, or listed pairs alone, and report recall@1/5/10 in both directions.

python inf_itm.py --txt_db DB --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR [--report] [--candidates FILE]
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import Loader
from data.split import RetrievalSplit
from evaluation.alignment import alignment_of_positives
from evaluation.analysis import analyse, summary_table
from evaluation.candidates import read_candidates
from evaluation.options import FROM_TRAINING, NO_PICTURES, InferenceOptions
from evaluation.recall import as_published, ranks, recalls, table
from evaluation.scoring import score_matrix
from evaluation.unfinished import UnfinishedScores
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
    """Options → data → checkpoint → scores → recall@K; the same on every worker, worker 0 writes."""
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
            compute = ComputeSettings(
                precision,
                ChunkSize.for_device(device, config.intermediate_size, options.batch_size),
                prepare=packed_for_inference,
            )
            model, loaded = load_ranking_model(options.checkpoint, config)
            model.to(device)
            source = stack.enter_context(
                RetrievalSplit(
                    options.txt_db, options.img_db, config.input_limits, options.box_rule, compressed=options.compressed_db
                )
            )
            candidates = None
            if options.candidates:
                candidates = read_candidates(options.candidates, source.text_db.ids, source.image_names)
            origin = {
                "model_config": config.to_dict(),
                "candidates": candidates and candidates.fingerprint(),
                "precision": f"{precision.name} on {device.type}",
                **source.fingerprint(),
            }
        group.check_same(origin)
        group.broadcast(model.state_dict().values())
        LOGGER.info("weights from %s", loaded)
        LOGGER.info("%s; %s on %s", group.launcher, precision.name, device)
        unfinished, output = None, Path(options.output_dir)
        with group.raise_on_all_ranks():
            if group.is_main:
                check_report(options)
                stack.enter_context(output_folder(output))
                origin["checkpoint"] = sha256(options.checkpoint)
                shape = len(source.text_db.ids), len(source.image_names)
                unfinished = stack.enter_context(UnfinishedScores(output, shape, origin, candidates))

        into = unfinished.scores if unfinished else None
        scored = score_matrix(model, source, compute, loader, group, candidates=candidates, into=into)
        alignment = alignment_of_positives(model, source, compute, loader, group)
        if scored is None or unfinished is None:
            return
        names = {"txt_ids": np.array(list(scored.text_ids)), "img_ids": np.array(list(scored.image_names))}
        save_npz(output / "scores.npz", scores=scored.scores, **names)
        found = ranks(scored.scores, source.image_of)
        measured, published = recalls(found), as_published(found)
        results: dict[str, Any] = dict(measured)
        results["as_published"] = published
        results["alignment"] = alignment
        results["analysis"] = analyse(found, source.image_of, source.text_db.lengths, scored.regions)
        results["counts"] = {"texts": len(scored.text_ids), "images": len(scored.image_names), "pairs": scored.scores.size}
        if candidates is not None:
            results["counts"] |= candidates.counts(source.image_of)
        results["ties"] = found.ties
        results["seconds"] = time.perf_counter() - started
        results["provenance"] = {
            "options": asdict(options),
            "device": str(device),
            "precision": precision.name,
            "workers": group.world_size,
            "ranking_head": loaded.head,
            "checkpoint_sha256": origin["checkpoint"],
            "image_db": source.image_db.describe(),
            **provenance(),
        }
        save_json(output / "scores.json", results)
        print(table({Path(options.txt_db).name: measured, "counted as published": published}))
        if candidates is not None:
            print(candidates.summary(source.image_of))
        print(f"\n{summary_table(results['analysis'])}")
        LOGGER.info("wrote %s and %s", output / "scores.json", output / "scores.npz")
    if options.report:
        from evaluation.report.build import write_report  # takes a second to import, and is for this alone

        write_report([output], output / "report", Path(options.report) if options.report != NO_PICTURES else None)
        LOGGER.info("wrote %s", output / "report/index.html")


def check_report(options: InferenceOptions) -> None:
    """Raise ``InputError`` now, and not after all has been scored, where no report could be written."""
    report = Path(options.output_dir) / "report"
    if options.report and os.path.lexists(report):
        raise InputError(f"{report}: already exists; remove it or choose another output_dir")
    if options.report not in (None, NO_PICTURES) and not Path(options.report or "").is_dir():
        raise InputError(f"report {options.report}: no such folder, expected one with pictures")


if __name__ == "__main__":
    main(sys.argv[1:])

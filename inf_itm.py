#!/usr/bin/env python
"""Score every text of a split with every image, or only listed pairs, and report recall@1/5/10 in both directions.

python inf_itm.py --txt_db DB --img_db DB --checkpoint FILE --model_config JSON --output_dir DIR [--report] [--candidates FILE]
"""

from __future__ import annotations

from utils.startup import one_line_errors  # isort: split

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

from data.checks import check_vocabularies
from data.loader import Loader
from data.split import RetrievalSplit
from evaluation import recall
from evaluation.alignment import alignment_of_positives, alignment_table, check_regularisers
from evaluation.analysis import analyse, summary_table
from evaluation.candidates import Candidates, read_candidates
from evaluation.options import FROM_TRAINING, NO_PICTURES, InferenceOptions
from evaluation.results import made_with, saved_results
from evaluation.scoring import ScoreMatrix, partial_scores, remove_partial_scores, score_matrix
from model.checkpoint import load_ranking_model
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings
from utils.distributed import connect
from utils.errors import InputError
from utils.files import exclusive_folder, save_json, save_npz, sha256, why_not_writable
from utils.logging import log_to_screen
from utils.options import parse_options
from utils.precision import Precision, choose_device, choose_precision
from utils.signals import StopSignal

LOGGER = logging.getLogger("inference")


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Options → data → checkpoint → scores → recall@K. Runs on every rank; rank 0 writes."""
    started = time.perf_counter()
    with ExitStack() as stack:
        group = stack.enter_context(connect())
        stack.enter_context(StopSignal("; the same command resumes"))
        log_to_screen(group.rank)
        with group.raise_on_all_ranks():
            options = parse_options(InferenceOptions, argv, __doc__ or "", inherit=FROM_TRAINING)
            output = Path(options.output_dir)
            read_only = os.path.exists(output / "scores.json") and why_not_writable(output)  # still, a result can be printed
            if group.is_main and not read_only:
                stack.enter_context(exclusive_folder(output))
            device = choose_device(options.device, group.local_rank, group.local_size)
            precision = Precision(choose_precision(options.precision, options.fp16, device), device)
            loader = Loader(device, options.workers, options.pin_mem)
            config = UniterConfig.from_json(options.architecture)
            chunk = ChunkSize.for_device(device, config.intermediate_size, options.batch_size)
            compute = ComputeSettings(precision, chunk, prepare=packed_for_inference)
            model, loaded = load_ranking_model(options.checkpoint, config)
            checksum = sha256(options.checkpoint) if group.is_main else ""
            model.to(device)
            limits, compressed = config.input_limits, options.compressed_db
            split = RetrievalSplit(options.txt_db, options.img_db, limits, options.box_rule, compressed=compressed)
            metas = {options.txt_db: stack.enter_context(split).text_db.meta}
            check_vocabularies(metas, options.checkpoint, options.train_config)
            text_ids, image_names = split.text_db.ids, split.image_names
            candidates = read_candidates(options.candidates, text_ids, image_names) if options.candidates else None
            origin = {
                "model_config": config.to_dict(),
                "box_rule": asdict(options.box_rule),
                "candidates": candidates and candidates.fingerprint(),
                "precision": f"{precision.name} on {device.type}",
                **split.fingerprint(),
            }
            regularisers = check_regularisers(config.num_attention_heads)
        group.check_same(origin | regularisers)
        group.broadcast(model.state_dict().values())
        LOGGER.info("weights from %s", loaded)
        LOGGER.info("%s; %s on %s", group.launcher, precision.name, device)

        def tables(results: dict[str, Any]) -> str:
            rows = {Path(options.txt_db).name: results, "counted as published": results["as_published"]}
            listed = [] if candidates is None else [candidates.summary(split.image_of)]
            alignment, analysis = alignment_table(results["alignment"]), summary_table(results["analysis"])
            return "\n".join([recall.table(rows), *listed, "", alignment, "", analysis])

        partial = results = None
        with group.raise_on_all_ranks():
            if group.is_main:
                origin["checkpoint"] = checksum
                results = saved_results(output / "scores.json", origin | regularisers, tables, options.checkpoint)
                check_outputs(options, finished=results is not None)
                if results is None:
                    shape = len(text_ids), len(image_names)
                    partial = stack.enter_context(partial_scores(output, shape, origin, candidates))
        if group.share(results is None):
            scored = score_matrix(model, split, compute, loader, group, candidates=candidates, into=partial)
            alignment = alignment_of_positives(model, split, compute, loader, group)
            if scored is not None:
                ids = {"txt_ids": np.array(list(text_ids)), "img_ids": np.array(list(image_names))}
                save_npz(output / "scores.npz", scores=scored.scores, **ids)
                more = {"workers": group.world_size, "ranking_head": loaded.head, "origin": origin | regularisers}
                more |= {"files": {"scores.npz": sha256(output / "scores.npz")}, "checkpoint_sha256": checksum}
                results = measure(scored, split, candidates) | {
                    "alignment": alignment,
                    "seconds": time.perf_counter() - started,
                    "provenance": made_with(options, precision, split.image_db, **more),
                }
                save_json(output / "scores.json", results)
                LOGGER.info("wrote %s and %s", output / "scores.json", output / "scores.npz")
        if results is None:
            return
        if not read_only:
            remove_partial_scores(output)
        report = output / "report"
        try:
            if options.report and report.exists():
                LOGGER.info("kept %s; remove it to write it again", report)
            elif options.report:
                from evaluation.report.page import write_report  # takes a second to import, and is rarely needed

                write_report([output], report, Path(options.report) if options.report != NO_PICTURES else None)
                LOGGER.info("wrote %s", report / "index.html")
        finally:  # last, because the reader of the output may have ended
            print(tables(results))


def measure(scored: ScoreMatrix, split: RetrievalSplit, candidates: Candidates | None) -> dict[str, Any]:
    """Return what ``scores.json`` says about the scores: recalls, error analysis, counts and ties."""
    ranks = recall.ranks(scored.scores, split.image_of)
    counts = {"texts": len(scored.text_ids), "images": len(scored.image_names), "pairs": scored.scores.size}
    return {
        **recall.recalls(ranks),
        "as_published": recall.as_published(ranks),
        "analysis": analyse(ranks, split.image_of, split.text_db.lengths, scored.regions),
        "counts": counts if candidates is None else counts | candidates.counts(split.image_of),
        "ties": ranks.ties,
    }


def check_outputs(options: InferenceOptions, finished: bool) -> None:
    """Raise ``InputError`` before scoring starts if there is another evaluation's report, or no pictures for one."""
    folder = Path(options.output_dir)
    strays = [folder / "report"]
    if not (folder / "scores.partial.npy").exists():  # otherwise a kill came between the scores and scores.json
        strays.append(folder / "scores.npz")
    for stray in strays:
        if not finished and os.path.lexists(stray):
            raise InputError(f"{stray}: already exists, but no scores.json; remove it or choose another output_dir")
    if options.report not in (None, NO_PICTURES) and not Path(options.report or "").is_dir():
        raise InputError(f"report {options.report}: no such folder, expected a folder of pictures")


if __name__ == "__main__":
    main(sys.argv[1:])

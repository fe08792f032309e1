"""How long an update takes on one and on several workers of this machine, one thread each, and what share is communication.

    python benchmarks/scaling.py --model_config config/uniter-base.json --micro_steps 1 --updates 2

Data are random, of Flickr30k's sizes: images of 36 regions on average (10 to 100), texts of 5 to 30 word pieces, in a real
database. Besides the workers' updates it times as many processes side by side that do not communicate: what those lose, the
machine lacks (memory bandwidth, shared cores), not the program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.synthetic import write_data
from data.datasets import HardNegativeDataset
from data.loader import Loader
from data.split import RetrievalSplit
from model.chunks import ChunkSize
from model.config import UniterConfig
from model.cpu import packed_for_inference
from model.retrieval import ComputeSettings, RetrievalModel
from optim.options import TrainOptions
from optim.trainer import Trainer
from utils.distributed import ProcessGroup, connect
from utils.precision import Precision, choose_precision
from utils.provenance import provenance

CPU = torch.device("cpu")


def measure(arguments: argparse.Namespace, group: ProcessGroup) -> dict[str, Any]:
    """Seconds of updates on this worker, and of the communication in them."""
    config = UniterConfig.from_json(arguments.model_config)
    options = TrainOptions(
        train_txt_dbs=("t",), train_img_dbs=("i",), val_txt_db="t", val_img_db="i", output_dir="o", IAIS="singular",
        train_batch_size=arguments.micro_steps, negative_size=arguments.negative_size, hard_neg_size=31, num_train_steps=1000,
    )  # fmt: skip
    precision = Precision(choose_precision(arguments.precision, False, CPU), CPU)
    compute = ComputeSettings(
        precision,
        ChunkSize.for_device(CPU, config.intermediate_size, arguments.negative_size + 1),
        prepare=packed_for_inference,
    )
    torch.manual_seed(0)
    trainer = Trainer(RetrievalModel(config), options, compute, group)
    communicating: list[float] = []
    average = group.average

    def timed(tensor: Tensor) -> None:
        started = time.perf_counter()
        average(tensor)
        communicating.append(time.perf_counter() - started)

    group.average = timed  # type: ignore[method-assign]
    data = Path(arguments.data)
    with RetrievalSplit(str(data / "texts.db"), str(data / "images"), config.input_limits) as source:
        task = HardNegativeDataset(
            [source],
            negative_size=arguments.negative_size,
            micro_steps=arguments.micro_steps * (1 + arguments.updates),
            rank=group.rank,
            world_size=group.world_size,
        )
        halves = Loader(CPU)(task)
        trainer.update(halves, 0)  # the first one allocates
        communicating.clear()
        seconds = []
        for number in range(1, 1 + arguments.updates):
            started = time.perf_counter()
            trainer.update(halves, number)
            seconds.append(time.perf_counter() - started)
    message = trainer.gradient.flat
    alone = []
    for _ in range(5):
        group.share(None)  # all begin together, so that nobody's lateness is counted
        started = time.perf_counter()
        average(message)
        alone.append(time.perf_counter() - started)
    return {"updates": seconds, "averaging": sum(communicating) / sum(seconds), "message": min(alone), "bytes": message.nbytes}


def start(arguments: argparse.Namespace, workers: int, output: Path) -> subprocess.Popen[bytes]:
    """This program again, on so many workers."""
    launcher = {
        "torchrun": ["torchrun", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node", str(workers)],
        "horovodrun": ["horovodrun", "-np", str(workers), sys.executable],
    }[arguments.launcher]
    passed = {key: value for key, value in vars(arguments).items() if key not in ("launcher", "workers", "rounds", "output")}
    words = [word for key, value in passed.items() for word in (f"--{key}", str(value))]
    program = [*(launcher if workers > 1 else [sys.executable]), __file__, *words, "--output", str(output)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(program, env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run, or on a worker measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="config/uniter-tiny.json")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--micro_steps", type=int, default=8, help="of one update on each worker")
    parser.add_argument("--negative_size", type=int, default=399)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="how often one, side by side and together take turns")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--launcher", choices=("torchrun", "horovodrun"), default="torchrun")
    parser.add_argument("--data", help="given by this program to its workers")
    parser.add_argument("--output", help="likewise")
    arguments = parser.parse_args()
    if arguments.output:
        with connect() as group:
            found = measure(arguments, group)
            Path(arguments.output).with_suffix(f".{group.rank}").write_text(json.dumps(found))
        return

    with tempfile.TemporaryDirectory() as folder:
        arguments.data = folder
        images = arguments.negative_size + 101
        write_data(Path(folder), UniterConfig.from_json(arguments.model_config), images, texts=5 * images)
        count = arguments.workers
        ways = {"one": [1], "side by side": [1] * count, "together": [count]}
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for number in range(arguments.rounds):  # in turns, since machines have slow minutes
            for way, processes in ways.items():
                files = [Path(folder) / f"{number}-{way}-{process}" for process in range(len(processes))]
                running = [start(arguments, size, file) for size, file in zip(processes, files, strict=True)]
                if any(process.wait() for process in running):
                    sys.exit(f"{way}: a process failed")
                results[way] += [json.loads(path.read_text()) for path in sorted(Path(folder).glob(f"{number}-{way}-*.*"))]
    update = {way: float(np.median([s for result in of for s in result["updates"]])) for way, of in results.items()}
    message = min(result["message"] for result in results["together"])
    averaging = max(result["averaging"] for result in results["together"])
    print(json.dumps({"arguments": vars(arguments), "results": results, "machine": provenance()["machine"]}))
    print(f"update, median: one worker {update['one']:.2f} s, {count} side by side {update['side by side']:.2f} s", end=", ")
    print(f"{count} workers together {update['together']:.2f} s")
    print(f"weak-scaling efficiency {update['one'] / update['together']:.1%}", end=", ")
    print(f"of what the machine allows {update['side by side'] / update['together']:.1%}")
    megabytes, share = results["one"][0]["bytes"] / 1e6, message / update["together"]
    print(f"message of {megabytes:.1f} MB: {message:.3f} s, {share:.2%} of an update")
    print(f"averaging, with waiting for one another: {averaging:.2%} of the updates on the worker that waits most")


if __name__ == "__main__":
    main()

"""Measure an update on one rank and on several ranks of this machine, one thread each, and the share of communication.

    python benchmarks/scaling.py --model_config config/uniter-base.json --micro_steps 1 --updates 2

Data are random, of Flickr30k's sizes, in a real database. Besides the ranks' updates it times as many processes side by side
that do not communicate: what those lose, the machine lacks (memory bandwidth, shared cores), not the program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import CPU, seconds_of, timing
from benchmarks.synthetic import compute_settings, open_split, random_model, train_options, write_data
from data.datasets import HardNegativeDataset
from data.loader import Loader
from model.config import UniterConfig
from optim.trainer import Trainer
from utils.distributed import ProcessGroup, connect
from utils.errors import one_line_errors
from utils.precision import choose_precision
from utils.provenance import provenance


def measure(options: argparse.Namespace, group: ProcessGroup) -> dict[str, Any]:
    """Return the seconds of the updates on this rank, the share of averaging in them, and what a message takes alone."""
    config = UniterConfig.from_json(options.model_config)
    precision = choose_precision(options.precision, False, CPU)
    compute = compute_settings(config, options.negative_size + 1, precision)
    trainer = Trainer(random_model(config), train_options(options.negative_size, options.micro_steps), compute, group)
    average, communication = group.average, {"": 0.0}
    group.average = timing(communication, "", average, CPU)  # type: ignore[method-assign]
    with open_split(options.output.parent, config) as split:
        dataset = HardNegativeDataset(
            [split],
            negative_size=options.negative_size,
            micro_steps=options.micro_steps * (1 + options.updates),
            rank=group.rank,
            world_size=group.world_size,
        )
        halves = Loader(CPU)(dataset)
        trainer.update(halves, 0)  # the first one allocates
        communication[""] = 0.0
        updates = [seconds_of(lambda number=number: trainer.update(halves, number)) for number in range(1, 1 + options.updates)]
    message = trainer.gradient.flat
    alone = []
    for _ in range(5):
        group.share(None)  # start together, so that no rank waits for another
        alone.append(seconds_of(lambda: average(message)))
    return {"updates": updates, "averaging": communication[""] / sum(updates), "message": min(alone), "bytes": message.nbytes}


def start(options: argparse.Namespace, ranks: int, output: Path) -> subprocess.Popen[bytes]:
    """Start this program again on ``ranks`` ranks, which write ``output`` with the rank as its suffix."""
    launcher = {
        "torchrun": ["torchrun", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node", str(ranks)],
        "horovodrun": ["horovodrun", "-np", str(ranks), sys.executable],
    }[options.launcher]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [*(launcher if ranks > 1 else [sys.executable]), __file__, *sys.argv[1:], "--output", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.DEVNULL,
    )


@one_line_errors
def main() -> None:
    """Take turns and print; on a rank, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="config/uniter-tiny.json")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--micro_steps", type=int, default=8, help="micro-steps per update on each rank")
    parser.add_argument("--negative_size", type=int, default=399)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="turns of one rank, side by side, and together")
    parser.add_argument("--ranks", "--workers", type=int, default=2)
    parser.add_argument("--launcher", choices=("torchrun", "horovodrun"), default="torchrun")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # for the ranks
    options = parser.parse_args()
    if options.output:
        with connect() as group:
            options.output.with_suffix(f".{group.rank}").write_text(json.dumps(measure(options, group)))
        return

    ranks = options.ranks
    setups = {"one": [1], "side by side": [1] * ranks, "together": [ranks]}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in setups}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        images = options.negative_size + 101
        write_data(folder, UniterConfig.from_json(options.model_config), images, texts=5 * images)
        for number in range(options.rounds):  # in turns, since a shared machine has slow minutes
            for name, sizes in setups.items():
                stem = f"{number}-{name}-"
                processes = [start(options, size, folder / f"{stem}{index}") for index, size in enumerate(sizes)]
                if any(process.wait() for process in processes):
                    sys.exit(f"{name}: a process failed")
                results[name] += [json.loads(path.read_text()) for path in sorted(folder.glob(f"{stem}*.*"))]
    one, beside, together = (float(np.median([s for found in of for s in found["updates"]])) for of in results.values())
    message = min(found["message"] for found in results["together"])
    averaging = max(found["averaging"] for found in results["together"])
    print(
        json.dumps(
            {
                "arguments": {key: value for key, value in vars(options).items() if key != "output"},
                "results": results,
                "machine": provenance()["machine"],
            }
        )
    )
    print(f"update, median: one rank {one:.2f} s, {ranks} side by side {beside:.2f} s, {ranks} ranks together {together:.2f} s")
    print(f"weak-scaling efficiency {one / together:.1%}, of what the machine allows {beside / together:.1%}")
    print(f"message of {results['one'][0]['bytes'] / 1e6:.1f} MB: {message:.3f} s, {message / together:.2%} of an update")
    print(f"averaging, including waiting: {averaging:.2%} of the updates on the rank that waits most")


if __name__ == "__main__":
    main()

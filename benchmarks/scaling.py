"""Measure an update on one rank and on several ranks of this machine, one thread each, and the share of communication.

    python benchmarks/scaling.py --model_config config/uniter-base.json --micro_steps 1 --updates 2

Data are random, of Flickr30k's sizes, in a real database. Besides the ranks' updates it times as many processes side by side
that do not communicate: their slowdown is due to the machine (memory bandwidth, shared cores), not to the program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors  # isort: split

import numpy as np

from benchmarks.machine import CPU, seconds_of, timing
from benchmarks.synthetic import compute_settings, open_split, random_model, train_options, write_data
from data.datasets import HardNegativeDataset
from data.loader import Loader
from model.config import UniterConfig
from model.cpu import recompute_in_backward
from optim.trainer import Trainer
from utils.distributed import ProcessGroup, connect
from utils.provenance import provenance

NEGATIVES = 399


def measure(options: argparse.Namespace, group: ProcessGroup) -> dict[str, Any]:
    """Return the seconds of the updates on this rank, the share of averaging in them, and what a message takes alone."""
    config = UniterConfig.from_json(options.model_config)
    settings = train_options(NEGATIVES, options.micro_steps), compute_settings(config, NEGATIVES + 1)
    model = random_model(config)
    recompute_in_backward(model)
    trainer = Trainer(model, *settings, group)
    average, communication = group.average, Counter[str]()
    group.average = timing(communication, "")(average)
    with open_split(options.output.parent, config) as split:
        steps, share = options.micro_steps * (1 + options.updates), {"rank": group.rank, "world_size": group.world_size}
        halves = Loader(CPU)(HardNegativeDataset([split], negative_size=NEGATIVES, micro_steps=steps, **share))
        trainer.update(halves, 0)  # the first one allocates
        communication.clear()
        updates = [seconds_of(lambda number=number: trainer.update(halves, number)) for number in range(1, 1 + options.updates)]
    message = trainer.gradient.flat
    alone = []
    for _ in range(5):
        group.share(None)  # start together, so that no rank waits for another
        alone.append(seconds_of(lambda: average(message)))
    return {"updates": updates, "averaging": communication[""] / sum(updates), "message": min(alone), "bytes": message.nbytes}


def start(ranks: int, output: Path) -> subprocess.Popen[bytes]:
    """Start this program again on ``ranks`` ranks, which write ``output`` with the rank as its suffix."""
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node"]
    launcher = [*torchrun, str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--output", str(output)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


@one_line_errors
def main() -> None:
    """Take turns and print; on a rank, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default="config/uniter-tiny.json")
    parser.add_argument("--micro_steps", type=int, default=8, help="micro-steps per update on each rank")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="turns of one rank, side by side, and together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # for the ranks
    options = parser.parse_args()
    if options.output:
        with connect() as group:
            options.output.with_suffix(f".{group.rank}").write_text(json.dumps(measure(options, group)))
        return

    ranks = options.ranks
    setups = {"one": [1], "side by side": [1] * ranks, "together": [ranks]}
    results: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        images = NEGATIVES + 101
        write_data(Path(folder), UniterConfig.from_json(options.model_config), images, texts=5 * images)
        for number, (name, sizes) in itertools.product(range(options.rounds), setups.items()):  # slow minutes hit all alike
            stem = f"{number}-{name}-"
            processes = [start(size, Path(folder, f"{stem}{index}")) for index, size in enumerate(sizes)]
            if any(process.wait() for process in processes):
                sys.exit(f"{name}: a process failed")
            results[name] += [json.loads(path.read_text()) for path in sorted(Path(folder).glob(f"{stem}*.*"))]
    one, beside, together = (float(np.median([found["updates"] for found in results[name]])) for name in setups)
    message = min(found["message"] for found in results["together"])
    averaging = max(found["averaging"] for found in results["together"])
    arguments = {key: value for key, value in vars(options).items() if key != "output"}
    print(json.dumps({"arguments": arguments, "results": results, "machine": provenance()["machine"]}))
    print(f"update, median: one rank {one:.2f} s, {ranks} side by side {beside:.2f} s, {ranks} ranks together {together:.2f} s")
    print(f"weak-scaling efficiency {one / together:.1%}, of what the machine allows {beside / together:.1%}")
    print(f"message of {results['one'][0]['bytes'] / 1e6:.1f} MB: {message:.3f} s, {message / together:.2%} of an update")
    print(f"averaging, including waiting: {averaging:.2%} of the updates on the rank that waits most")


if __name__ == "__main__":
    main()

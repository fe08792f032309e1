#!/usr/bin/env python
"""Draw the attention of a (text, image) pair, or the curves of training runs, as PNG or SVG.

    python scripts/visualize.py pair --checkpoint A/ckpt/model_best.pt B/ckpt/model_best.pt --img_db DB --txt_db DB \\
        --text_id 7 --images PICTURES --output pair.png
    python scripts/visualize.py run A B --output curves.png

Each command has its own --help; docs/evaluation.md explains the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.boxes import ImageOptions
from data.image_db import ImageDatabase
from data.picture_names import find_pictures
from data.text_db import Text, TextDatabase
from evaluation.alignment import check_regularisers
from evaluation.options import FROM_TRAINING
from evaluation.plots.curves import curves_figure
from evaluation.plots.pair import VIEWS, caption_of, pair_figure
from evaluation.plots.regions import read_picture
from evaluation.plots.style import check_format, save_figure, short_names
from evaluation.retriever import Retriever
from utils.errors import InputError, nearest
from utils.logging import read_scalars
from utils.options import check_at_least, check_sizes, option, parse_options, require
from utils.signals import StopSignal


@dataclass(frozen=True, kw_only=True)
class PairOptions(ImageOptions):
    """Options of ``visualize.py pair``."""

    checkpoint: tuple[str, ...] = option((), "weights; several are drawn side by side, such as before and after IAIS")
    model_config: str | None = option(None, "architecture; by default that of the run whose ckpt/ has the first weights")
    train_config: str | None = option(None, "log/hps.json of a training: its box options, unless given here")
    vocab: str | None = option(None, "vocab.txt of the model, if not that of bert-base-cased")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the GPU if there is one")
    img_db: str = option("", "image database")
    image: str | None = option(None, "name of the image in it; by default that of the text")
    text: str | None = option(None, "a caption")
    txt_db: str | None = option(None, "text database, instead of a caption")
    text_id: str | None = option(None, "id of the text in it")
    picture: str | None = option(None, "picture of the image; without it, regions are numbers in an empty frame of 4:3")
    images: str | None = option(None, "folder that contains the picture, named like the image")
    layer: int = option(-1, "layer, 0 the first, -1 the last")
    head: int | None = option(None, "head, 0 the first; by default the average of all")
    show: tuple[str, ...] = option(("boxes", "linguistic", "blocks"), f"what to draw, from {', '.join(VIEWS)}")
    own_colours: bool = option(False, "scale the colours of each map to its own values instead of a common scale from 0")
    output: str = option("", "file to write, .png or .svg")

    def __post_init__(self) -> None:
        check_sizes(self)
        require(self, "checkpoint", "img_db", "output", "show")
        check_format(self.output)
        for view in self.show:
            if view not in VIEWS:
                raise InputError(f"show names {view!r}, expected some of {', '.join(VIEWS)}{nearest(view, VIEWS)}")
        if (self.txt_db is None) != (self.text_id is None) or (self.text is None) == (self.text_id is None):
            raise InputError("text, or txt_db and text_id: expected one of the two")
        if self.text is not None and self.image is None:
            raise InputError("image is missing, expected the name of the image with text")
        if self.picture and self.images:
            raise InputError("picture and images: both are given, expected one of them")
        check_at_least(self, -1, "layer")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see pair --help and run --help")
    given = parser.parse_args(arguments)
    with StopSignal():
        COMMANDS[given.command](given.options)


def draw_pair(arguments: Sequence[str]) -> None:
    """Draw one pair as one or more models see it."""
    options = parse_options(PairOptions, arguments, "Draw the attention of a (text, image) pair.", inherit=FROM_TRAINING)
    text: str | Text = options.text or ""
    if options.txt_db is not None and options.text_id is not None:
        with closing(TextDatabase(options.txt_db)) as text_db:
            text = text_db[options.text_id]
    name = options.image or (text.image if isinstance(text, Text) else "")
    with closing(ImageDatabase(options.img_db, options.box_rule, compressed=options.compressed_db)) as image_db:
        image = image_db[name]
    file = find_pictures(Path(options.images), [name])[name] if options.images else options.picture
    picture = read_picture(file) if file else None
    attentions = {}
    for model, checkpoint in zip(short_names(options.checkpoint), options.checkpoint, strict=True):
        architecture = options.model_config or model_config_of(options.checkpoint[0])
        given = {"vocab": options.vocab, "train_config": options.train_config}
        retriever = Retriever.from_checkpoint(checkpoint, architecture, **given, device=options.device)
        check_regularisers(retriever.config.num_attention_heads)
        if isinstance(text, Text):
            retriever.check_vocabulary(text_db)
        layer = retriever.config.num_hidden_layers - 1 if options.layer == -1 else options.layer
        attentions[model] = retriever.attention(text, image, [layer])
    caption = caption_of(text, next(iter(attentions.values())))
    figure = pair_figure(
        attentions, text=caption, picture=picture, head=options.head, views=options.show, own_colours=options.own_colours
    )
    save_figure(figure, options.output)
    print(f"wrote {options.output}")


def model_config_of(checkpoint: str) -> str:
    """Return the path of the architecture that a training saved beside the folder of its checkpoints."""
    path = Path(checkpoint).absolute().parent.parent / "log/model.json"
    if not path.is_file():
        raise InputError(f"model_config is missing, and {checkpoint} is not of a run: there is no {path}")
    return str(path)


def draw_run(arguments: Sequence[str]) -> None:
    """Draw the curves of one or more runs."""
    parser = argparse.ArgumentParser(
        prog="visualize.py run", description="Draw losses, λ_t and recalls of training runs.", allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output_dir of a training, finished or not")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .png or .svg")
    options = parser.parse_args(arguments)
    check_format(options.output)
    scalars = [read_scalars(Path(run) / "log") for run in options.runs]
    save_figure(curves_figure(dict(zip(short_names(options.runs), scalars, strict=True))), options.output)
    print(f"wrote {options.output}")


COMMANDS = {"pair": draw_pair, "run": draw_run}


if __name__ == "__main__":
    main()

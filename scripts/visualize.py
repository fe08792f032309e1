#!/usr/bin/env python
"""Draw the attention of a (text, image) pair, or the curves of training runs, as PNG or SVG.

    python scripts/visualize.py pair --checkpoint A/ckpt/model_best.pt B/ckpt/model_best.pt --img_db DB --txt_db DB \\
        --text_id 7 --images PICTURES --output pair.png
    python scripts/visualize.py run A B --output curves.png

Each has its own --help; docs/evaluation.md says what is in the pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.boxes import ImageOptions
from data.image_db import Image, ImageDatabase
from data.picture_names import find_pictures
from data.text_db import Text, TextDatabase
from data.tokenizer import joined
from evaluation.options import FROM_TRAINING
from evaluation.plots.curves import curves_figure
from evaluation.plots.drawing import check_format, save_figure
from evaluation.plots.pictures import VIEWS, pair_figure
from evaluation.plots.regions import read_picture
from evaluation.retriever import Attention, Retriever
from utils.errors import InputError, nearest, one_line_errors
from utils.logging import read_scalars
from utils.options import check_at_least, check_sizes, option, parse_options, require


@dataclass(frozen=True, kw_only=True)
class PairOptions(ImageOptions):
    """Options of ``visualize.py pair``."""

    checkpoint: tuple[str, ...] = option((), "weights; several are drawn side by side, such as those before and after IAIS")
    model_config: str | None = option(None, "architecture; if not given, that of the run in whose ckpt/ the first weights are")
    train_config: str | None = option(None, "log/hps.json of a training: its box options, where not given here")
    vocab: str | None = option(None, "vocab.txt of the model, if not that of bert-base-cased")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps; auto takes the GPU where there is one")
    img_db: str = option("", "image database")
    image: str | None = option(None, "name of the image in it; if not given, that of the text")
    text: str | None = option(None, "a caption")
    txt_db: str | None = option(None, "text database, instead")
    text_id: str | None = option(None, "which of its texts")
    picture: str | None = option(None, "the image's picture; without it, regions are numbers in an empty frame of 4:3")
    images: str | None = option(None, "a folder that has it, under the name that the image is called after")
    layer: int = option(-1, "layer, 0 the first, -1 the last")
    head: int | None = option(None, "head, 0 the first; all of them averaged if not given")
    show: tuple[str, ...] = option(("boxes", "linguistic", "blocks"), f"what to draw, of {', '.join(VIEWS)}")
    own_colours: bool = option(False, "colours of each map from its least to its largest value, otherwise common ones from 0")
    output: str = option("", "file to draw, .png or .svg")

    def __post_init__(self) -> None:
        check_sizes(self)
        require(self, "checkpoint", "img_db", "output", "show")
        check_format(self.output)
        for view in self.show:
            if view not in VIEWS:
                raise InputError(f"show names {view!r}, expected of {', '.join(VIEWS)}{nearest(view, VIEWS)}")
        if (self.txt_db is None) != (self.text_id is None) or (self.text is None) == (self.text_id is None):
            raise InputError("text, or txt_db and text_id: expected one of the two")
        if self.text is not None and self.image is None:
            raise InputError("image is missing, expected the name of the image beside text")
        if self.picture and self.images:
            raise InputError("picture and images: both are given, expected one of them")
        check_at_least(self, -1, "layer")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the first word says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see pair --help and run --help")
    given = parser.parse_args(arguments)
    COMMANDS[given.command](given.options)


def draw_pair(arguments: Sequence[str]) -> None:
    """One pair as one or more models see it."""
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
    names = short_names(options.checkpoint)
    seen = [attention_of(checkpoint, options, text, image) for checkpoint in options.checkpoint]
    figure = pair_figure(
        dict(zip(names, seen, strict=True)),
        text=caption_of(text, seen[0]),
        picture=picture,
        head=options.head,
        views=options.show,
        own_colours=options.own_colours,
    )
    save_figure(figure, options.output)
    print(f"wrote {options.output}")


def attention_of(checkpoint: str, options: PairOptions, text: str | Text, image: Image) -> Attention:
    """The attention of one model in the layer that the options name."""
    architecture = options.model_config or model_config_of(options.checkpoint[0])
    retriever = Retriever.from_checkpoint(checkpoint, architecture, vocab=options.vocab, device=options.device)
    layer = retriever.config.num_hidden_layers - 1 if options.layer == -1 else options.layer
    return retriever.attention(text, image, [layer])


def model_config_of(checkpoint: str) -> str:
    """The architecture that a training wrote down beside the folder of its checkpoints."""
    path = Path(checkpoint).absolute().parent.parent / "log/model.json"
    if not path.is_file():
        raise InputError(f"model_config is missing, and {checkpoint} is not of a run: there is no {path}")
    return str(path)


def caption_of(text: str | Text, attention: Attention) -> str:
    """A text as its author wrote it; where a database has not kept that, its word pieces."""
    if isinstance(text, str):
        return text
    return text.caption or joined(attention.pieces)


def draw_run(arguments: Sequence[str]) -> None:
    """The curves of one or more runs."""
    parser = argparse.ArgumentParser(
        prog="visualize.py run", description="Draw losses, λ_t and recalls of training runs.", allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output_dir of a training, finished or not")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to draw, .png or .svg")
    options = parser.parse_args(arguments)
    check_format(options.output)
    scalars = [read_scalars(Path(run) / "log") for run in options.runs]
    save_figure(curves_figure(dict(zip(short_names(options.runs), scalars, strict=True))), options.output)
    print(f"wrote {options.output}")


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells paths apart: they without the folders that all begin and end with. Raises ``InputError`` for equal ones."""
    parts = [Path(path).absolute().parts for path in paths]
    twice = next((path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice, expected different ones to compare")
    if len(paths) == 1:
        return [str(paths[0])]
    start = common(parts)
    end = common([own[start:][::-1] for own in parts])
    shortened = ["/".join(own[start : len(own) - end]) for own in parts]
    return shortened if all(shortened) else list(paths)


def common(sequences: Sequence[Sequence[str]]) -> int:
    """How many items all sequences begin with."""
    return len(list(takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))))


COMMANDS = {"pair": draw_pair, "run": draw_run}


if __name__ == "__main__":
    main()

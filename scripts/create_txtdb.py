"""Make a text database from captions.

    python scripts/create_txtdb.py --annotations dataset_flickr30k.json --split test --output itm_flickr30k_test.db

Annotations are Karpathy's JSON, JSONL or CSV with ``image``, ``caption`` and ``split``, or the token file of Flickr8k or
Flickr30k, of which ``--split`` is a file that lists pictures (Flickr_8k.testImages.txt). On an error nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.startup import one_line_errors
from data.sources.captions import captions_of, tokenizer_of, write_captions
from data.text_db import TextDatabaseWriter
from utils.errors import counted
from utils.files import sha256
from utils.parallel import add_nproc
from utils.provenance import made_by
from utils.signals import StopSignal


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Read captions, split them into word pieces, write the database."""
    parser = argparse.ArgumentParser(description="Make a text database from captions.", allow_abbrev=False)
    parser.add_argument("--annotations", type=Path, required=True, help="Karpathy's .json, .jsonl, .csv, or a token file")
    parser.add_argument("--split", required=True, help="train, restval, val, test, …; for a token file, a list of pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as itm_flickr30k_test.db")
    parser.add_argument("--vocab", type=Path, help="vocab.txt of the model; default: that of bert-base-cased")
    add_nproc(parser)
    options = parser.parse_args(arguments)
    meta = {
        **tokenizer_of(options.vocab).meta(),
        "annotations": options.annotations.name,
        "annotations_sha256": sha256(options.annotations),
        "split": options.split,
        "made_by": made_by(__file__),
    }
    with StopSignal(), TextDatabaseWriter(options.output, meta) as database:
        captions = captions_of(options.annotations, options.split)
        write_captions(options.annotations, captions, database, options.vocab, options.nproc)
    images = {caption.image for caption in captions}
    print(f"{options.output}: {counted(len(captions), 'text')} of {counted(len(images), 'image')}")


if __name__ == "__main__":
    main()

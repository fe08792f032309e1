"""Make a text database from captions.

    python scripts/create_txtdb.py --annotations dataset_flickr30k.json --split test --output itm_flickr30k_test.db

Annotations are Karpathy's JSON, or JSONL or CSV with ``image``, ``caption`` and ``split``. The database appears whole or not.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.sources.captions import Caption, captions_of, read_annotations
from data.text_db import TextDatabaseWriter, encode_text
from data.tokenizer import WordPieceTokenizer, load_tokenizer
from utils.errors import one_line_errors
from utils.parallel import add_nproc, in_order
from utils.provenance import made_by
from utils.signals import Stop

CHUNK = 2000  # captions given to a worker at a time
PER_WORKER = 15_000  # captions that are done in the time in which another worker starts


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Make a text database from captions.", allow_abbrev=False)
    parser.add_argument("--annotations", type=Path, required=True, help=".json of Karpathy, or .jsonl or .csv")
    parser.add_argument("--split", required=True, help="train, restval, val, test, or what the file calls it")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as itm_flickr30k_test.db")
    parser.add_argument("--vocab", type=Path, help="vocab.txt of the model; default: that of bert-base-cased")
    add_nproc(parser)
    return parser.parse_args(arguments)


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # once in each worker


def pack(vocab: Path | None, captions: list[Caption]) -> list[tuple[str, str, bytes, int]]:
    """Text id, image, record and number of word pieces of each caption."""
    tokenizer: WordPieceTokenizer = _tokenizer(vocab)
    packed = []
    for caption in captions:
        ids = tokenizer.encode(caption.raw)
        record = encode_text(
            ids,
            caption.image,
            raw=caption.raw,
            toked_caption=tokenizer.tokens(ids),
            filename=caption.filename,
            split=caption.split,
            dataset=caption.dataset,
        )
        packed.append((caption.text_id, caption.image, record, len(ids)))
    return packed


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    """Read captions, split them into word pieces, write the database."""
    options = parse_options(arguments)
    contents = read_annotations(options.annotations)
    tokenizer = _tokenizer(options.vocab)
    meta = {
        **tokenizer.meta(),
        "annotations": options.annotations.name,
        "annotations_sha256": hashlib.sha256(contents).hexdigest(),
        "split": options.split,
        "made_by": made_by(__file__),
    }
    with Stop(), TextDatabaseWriter(options.output, meta) as database:
        captions = captions_of(options.annotations, contents, options.split)
        chunks = [captions[first : first + CHUNK] for first in range(0, len(captions), CHUNK)]
        nproc = min(options.nproc, 1 + len(captions) // PER_WORKER)
        results = in_order(partial(pack, options.vocab), chunks, nproc)
        packed = chain.from_iterable(results)
        for caption in tqdm(packed, total=len(captions), desc=options.output.name, unit=" captions", disable=None):
            database.put_encoded(*caption)
    images = {caption.image for caption in captions}
    print(f"{options.output}: {len(captions):,} texts of {len(images):,} images")


if __name__ == "__main__":
    main()

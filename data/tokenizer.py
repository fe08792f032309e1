"""The word-piece tokenizer of bert-base-cased, applied word by word as in UNITER's databases.

The vocabulary comes from a ``vocab.txt`` or is rebuilt from a table in the PyPI package ``blingfire``: nothing is downloaded.
It agrees with the original BERT tokenizer except on unassigned code points, some 120 punctuation and format signs of rare
scripts, and the 256 ideographs from U+2B820, which the ``tokenizers`` library classifies in its own way.
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from utils.errors import InputError, counted
from utils.files import read_text

BERT_BASE_CASED_SHA256 = "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02"
_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def load_tokenizer(vocab: Path | str | None = None) -> WordPieceTokenizer:
    """Load the tokenizer of a vocabulary file (one word piece per line), or of bert-base-cased if none is given.

    Raises ``InputError`` for a file that is missing or not a BERT vocabulary, and if ``blingfire`` is needed but missing.
    """
    if vocab is None:
        return WordPieceTokenizer(_bert_base_cased(), "bert-base-cased")
    path = Path(vocab)
    # Not splitlines(): the vocabulary has pieces that it takes for line ends.
    pieces = [line.strip() for line in read_text(path, "a BERT vocabulary").removesuffix("\n").split("\n")]
    if "" in pieces:
        raise InputError(f"{path}: line {pieces.index('') + 1} is empty, expected a word piece")
    piece, times = Counter(pieces).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: word piece {piece!r} occurs {counted(times, 'time')}")
    for special in _SPECIAL:
        if special not in pieces:
            raise InputError(f"{path}: has no {special}, expected a BERT vocabulary")
    return WordPieceTokenizer(pieces, "bert-base-cased" if _checksum(pieces) == BERT_BASE_CASED_SHA256 else path.name)


def _checksum(pieces: Iterable[str]) -> str:
    """The SHA-256 of the ``vocab.txt`` of these word pieces."""
    return hashlib.sha256("".join(f"{piece}\n" for piece in pieces).encode()).hexdigest()


def _bert_base_cased() -> list[str]:
    """Rebuild the published vocabulary from blingfire's table.

    The table is a count, offsets, and three segments. The second segment is a count, offsets, and one UTF-8 text in which a
    piece that starts a word follows a space.
    """
    # Not imported: the package loads a native library that may not exist for this machine.
    package = importlib.util.find_spec("blingfire")
    if package is None or not package.submodule_search_locations:
        raise InputError("the bert-base-cased vocabulary: package blingfire is not installed; install it or pass a vocab.txt")
    file = Path(package.submodule_search_locations[0]) / "bert_base_cased_tok.i2w"
    try:
        table = file.read_bytes()
        _, start, end = struct.unpack_from("<3I", table, 4)
        (count,) = struct.unpack_from("<I", table, start)
        offsets = struct.unpack_from(f"<{count + 1}I", table, start + 4)
        text = table[start + 4 * (count + 2) : end]
        words = [text[first:last].decode("utf-8") for first, last in pairwise(offsets)]
    except (OSError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as blingfire's table of bert-base-cased ({error})") from error
    pieces = [word[1:] if word.startswith(" ") else "##" + word for word in words]
    if _checksum(pieces) != BERT_BASE_CASED_SHA256:
        raise InputError(f"{file}: does not give the published bert-base-cased vocabulary; pass a vocab.txt instead")
    return pieces


class WordPieceTokenizer:
    """Turns captions into word pieces and back; ``pieces`` is the vocabulary in the order of its ids, ``name`` its name."""

    def __init__(self, pieces: list[str], name: str) -> None:
        self.pieces, self.name = pieces, name
        self.ids = {piece: index for index, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(models.WordPiece(self.ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # Captions repeat a few words many times, and a word's pieces do not depend on its neighbours.
        self._word = lru_cache(maxsize=1 << 16)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _SPECIAL:
            return (self.ids[word],)
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def encode(self, raw: str) -> list[int]:
        """Return a caption's word-piece ids without [CLS] and [SEP]; empty for nothing but spaces and control characters."""
        return [number for word in raw.split() for number in self._word(word)]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the word pieces that ``ids`` stand for."""
        return [self.pieces[number] for number in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these word pieces, as ``joined`` does."""
        return joined(self.tokens(ids))

    def meta(self) -> dict[str, object]:
        """Return what ``meta.json`` of a text database says about its tokenizer; ordinary word pieces start at ``!``."""
        special = {name: self.ids[f"[{name}]"] for name in ("UNK", "CLS", "SEP", "MASK")}
        names = {"bert": self.name, "toker": self.name, "vocab_sha256": _checksum(self.pieces)}
        return {**names, **special, "v_range": [self.ids.get("!", 0), len(self.pieces)]}


def joined(pieces: Iterable[str]) -> str:
    """Join word pieces into a text; spaces around punctuation are not restored."""
    return " ".join(pieces).replace(" ##", "")

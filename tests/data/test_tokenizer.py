"""The tokenizer against the original BERT tokenizer, called word by word as UNITER called it."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_pretrained_bert.tokenization import BertTokenizer

from data import tokenizer as module
from data.tokenizer import BERT_BASE_CASED_SHA256, WordPieceTokenizer, load_tokenizer
from utils.errors import InputError

CAPTIONS = [
    "Two young guys with shaggy hair look at their hands while hanging out in the yard.",
    'A man\'s T-shirt says "I ♥ NY" & costs $9.99 (or less)...',
    "  leading,\ttabs \n newlines\r\n and  double spaces  ",
    "cafe\u0301 with a combining accent, and e\u0301e\u0301",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101 + " " + "é" * 100 + "," + "a" * 150,
    "word" + "\x00" * 10 + "s" * 100 + "-" + "w" * 100,
    "[CLS] a [MASK] b [SEP] [PAD] [UNK] [unused1] a[SEP]b [SEP]. [sep] [ SEP ]",
    "##ing un##able # # ## @-@ <unk> <s> http://a.b/c?d=e&f=g user@mail.com 1,000.50 3/4 10:30pm A.M.",
    "unaffable Unaffable UNAFFABLE uNaFfAbLe antidisestablishmentarianism Llanfairpwllgwyngyllgogerychwyrndrobwll",
    "",
    "\x00\u200b",
]


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def vocab(tokenizer: WordPieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("".join(piece + "\n" for piece in tokenizer.pieces), encoding="utf-8")
    return path


def random_captions(pieces: list[str]) -> list[str]:
    choose = random.Random(0)
    words = [piece.removeprefix("##") for piece in choose.sample(pieces, 3000)]
    signs = [" ", " ", " ", "", "", "-", "'", ",", ".", "\t", "é", "ß", "東", "\u0301", "\u00a0", "\x1f", "7"]
    lengths = [choose.randrange(1, 25) for _ in range(600)]
    return ["".join(choose.choice(words) + choose.choice(signs) for _ in range(length)) for length in lengths]


def characters(pieces: list[str]) -> list[str]:
    """Latin, Greek, Cyrillic, Hebrew, Arabic, punctuation, symbols, Japanese, Chinese, Korean, full-width forms, emoji."""
    blocks = [(0, 0x600), (0x620, 0x700), (0x1E00, 0x2E43), (0x3000, 0x3400), (0x4E00, 0x5200), (0xAC00, 0xAD00)]
    blocks += [(0xF900, 0x10000), (0x1F300, 0x1F650)]
    assigned = (chr(code) for block in blocks for code in range(*block) if unicodedata.category(chr(code)) != "Cn")
    return [f"a{character}b" for character in assigned]


@pytest.mark.parametrize("captions", [lambda pieces: CAPTIONS, random_captions, characters])
def test_equals_the_original(tokenizer: WordPieceTokenizer, vocab: Path, captions: Callable[[list[str]], list[str]]) -> None:
    original = BertTokenizer(str(vocab), do_lower_case=False)
    for raw in captions(tokenizer.pieces):
        expected = [index for word in raw.split() for index in original.convert_tokens_to_ids(original.tokenize(word))]
        assert tokenizer.encode(raw) == expected, raw


def test_vocabulary_file_and_table_are_one(tokenizer: WordPieceTokenizer, vocab: Path) -> None:
    loaded = load_tokenizer(vocab)
    assert loaded.pieces == tokenizer.pieces
    assert loaded.name == tokenizer.name == "bert-base-cased"
    special = {"UNK": 100, "CLS": 101, "SEP": 102, "MASK": 103}
    names = {"bert": "bert-base-cased", "toker": "bert-base-cased", "vocab_sha256": BERT_BASE_CASED_SHA256}
    assert tokenizer.meta() == {**names, "v_range": [106, 28996], **special}


def test_decode_joins_words(tokenizer: WordPieceTokenizer) -> None:
    ids = tokenizer.encode("A skateboarder, unaffable, rides.")
    assert tokenizer.decode(ids) == "A skateboarder , unaffable , rides ."
    assert tokenizer.tokens(tokenizer.encode("unaffable")) == ["un", "##af", "##fa", "##ble"]


SMALL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", "red", "##s"]


def test_other_vocabularies(tmp_path: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_bytes("\r\n".join(SMALL).encode())
    tokenizer = load_tokenizer(path)
    assert tokenizer.name == "small.txt"
    assert tokenizer.encode("reds red! blue") == [6, 7, 6, 5, 1]
    assert tokenizer.meta()["v_range"] == [5, 8]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("\n".join([*SMALL, "red"]), "word piece 'red' occurs 2 times"),
        ("\n".join([*SMALL, "", "blue"]), "line 9 is empty"),
        ("\n".join(SMALL[1:]), r"has no \[PAD\]"),
        ("", "line 1 is empty"),
        ("\udcff", "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_bad_vocabularies_are_named(tmp_path: Path, contents: str, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(contents, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=f"vocab.txt: {message}"):
        load_tokenizer(path)
    with pytest.raises(InputError, match=r"absent.txt: no such file, expected a BERT vocabulary"):
        load_tokenizer(tmp_path / "absent.txt")


def test_a_missing_or_changed_package_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BERT_BASE_CASED_SHA256", "0" * 64)
    with pytest.raises(InputError, match="does not give the published"):
        load_tokenizer()
    monkeypatch.undo()
    package = SimpleNamespace(submodule_search_locations=(str(tmp_path),))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: package)
    for contents in (b"", b"\x03\0\0\0\x10\0\0\0\x60\0\0\0\xff\xff\xff\xff"):
        (tmp_path / "bert_base_cased_tok.i2w").write_bytes(contents)
        with pytest.raises(InputError, match="cannot be read as blingfire's table"):
            load_tokenizer()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="blingfire is not installed"):
        load_tokenizer()

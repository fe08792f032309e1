"""Names behave as the list that they are made of."""

from __future__ import annotations

import pickle
import zlib

import pytest

from data.names import Names

WORDS = ["b", "a", "", "ü", "a longer one", "\ud800", "日本", *map(str, range(300))]


def test_names_are_the_list_that_they_were_made_of() -> None:
    names = Names(WORDS)
    assert list(names) == WORDS
    assert len(names) == len(WORDS)
    assert names[-1] == WORDS[-1]
    assert names[3:9:2] == WORDS[3:9:2]
    assert [names.place(word) for word in WORDS] == list(range(len(WORDS)))
    assert names.index("ü") == 3
    assert "zebra" not in names
    assert 7 not in names
    assert list(pickle.loads(pickle.dumps(names))) == WORDS
    with pytest.raises(IndexError):
        names[len(WORDS)]
    for arguments in (("zebra",), ("ü", 4), ("ü", 0, 3)):
        with pytest.raises(ValueError, match="is not among"):
            names.index(*arguments)


def test_none_at_all() -> None:
    assert list(Names([])) == []
    assert Names([]).place("a") is None


def test_names_of_one_checksum_are_told_apart() -> None:
    first, second = "codding", "gnu"  # a known collision of CRC-32
    assert zlib.crc32(first.encode()) == zlib.crc32(second.encode())
    assert [Names([first, "x", second]).place(name) for name in (first, second)] == [0, 2]
    assert Names([first]).place(second) is None

"""Pickles of plain values read as ``pickle`` reads them; no other pickle hangs or fills the memory."""

from __future__ import annotations

import pickle
import re
import time
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

from data.sources import plain_pickle
from data.sources.plain_pickle import MAX_BYTES, read_plain

PLAIN = {
    "float": 0.5, "int": 3, "long": 1 << 40, "big": 1 << 80, "text": "café", "none": None, "yes": True, "no": False,
    "list": [1, "a", [2.0]], "tuple": (1, (2, 3), (), (1, 2, 3, 4)), "bytes": b"\x00\xff", "empty": {}, "none at all": b"",
}  # fmt: skip
ARRAYS = {
    "single": np.arange(6, dtype=np.float32).reshape(2, 3), "by column": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big-endian": np.array(5, ">i2"), "no rows": np.zeros((0, 4)), "bool": np.array([True, False]), "scalar": np.float32(0.25),
}  # fmt: skip


@pytest.mark.parametrize(("protocol", "core"), [(2, b"numpy.core."), (2, b"numpy._core."), (3, b""), (4, b"")])
def test_plain_values_are_what_pickle_reads(protocol: int, core: bytes) -> None:
    arrays = {**ARRAYS, "same": ARRAYS["single"]}
    written = pickle.dumps({**PLAIN, **arrays}, protocol)
    if core:  # its name before and since numpy 2
        written = re.sub(rb"numpy\._?core\.", core, written)
    read = read_plain(written, [*PLAIN, *arrays, "absent"])
    assert {key: read.pop(key) for key in PLAIN} == PLAIN
    assert isinstance(read["scalar"], float)
    assert list(read) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key], array)
        assert key == "scalar" or read[key].dtype == array.dtype.newbyteorder("=")


def text(content: bytes) -> bytes:
    return b"X" + len(content).to_bytes(4, "little") + content


def named(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


ENCODE, RECONSTRUCT = named(b"_codecs", b"encode"), named(b"numpy.core.multiarray", b"_reconstruct")
DTYPE = named(b"numpy", b"dtype") + text(b"O8") + b"\x85R(K\x03" + text(b"|") + b"tb"
TUPLES = b")q\x00" + b"".join(b"(" + b"h%c" % level * 10 + b"tq%c" % (level + 1) for level in range(9))  # 10^9 in all
EQUAL_HASHES = b"".join(b"\x8a\x0c" + (number * (2**61 - 1)).to_bytes(12, "little") + b"N" for number in range(1, 40_000))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "pickle"),
        (b"K", "pickle"),
        (b".", "pickle"),
        (b"K\x01.", "int, expected a dict"),
        (b"ee.", "pickle"),
        (b"(t\x86.", "pickle"),
        (b"}(" + text(b"a") + b"u.", "pickle"),
        (b"h\x07.", "pickle"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "pickle"),
        (b")\x85" * 10 + text(b"a") + b"\x93.", "pickle"),
        (b"N" * 100_001 + b".", "more than 100,000"),
        (b"N" * (MAX_BYTES + 1), "expected at most"),
        (b"}" + text(b"a") + ENCODE + text(b"a") + text(b"utf-8") + b"\x86Rs.", "calls encode"),
        (b"}" + text(b"a") + named(b"numpy", b"ndarray") + text(b"a") + b"\x85Rs.", "pickle"),
        (b"}" + text(b"a") + RECONSTRUCT + b")R(K\x01)" + DTYPE + b"\x89]}atbs.", "is not a plain array"),
        (b"Nr\xff\xff\xff\x7f.", "expected a dict"),
        (TUPLES + b"}h\x09Ns.", "tuple as key"),
        (b"}(" + EQUAL_HASHES + b"u.", "int as key"),
        (b"\x8f" * 100_000 + b".", "EMPTY_SET"),
        (b"}" * 90_000 + b"\x94" * 9_990 + b".", ""),
        (b"]" * 50_000 + b"a" * 49_000 + b".", "expected a dict"),
        (ENCODE + b"q\x00(" + b"N" * 40_000 + b"tq\x01" + b"h\x00h\x01R" * 10_000 + b".", "40,000 arguments"),
    ],
    ids=range(22),
)
def test_hostile_pickles(pickled: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_INSTRUCTIONS", 100_000)  # a tenth of what is allowed, in a tenth of the time
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        read_plain(b"\x80\x04" + pickled, ["a"])
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()


def test_an_encoded_text_is_decoded_only_if_wanted() -> None:
    """A megabyte of text, encoded again and again, would fill the memory."""
    again = b"".join(text(b"%d" % number) + b"h\x01h\x00" + text(b"latin1") + b"\x86R" for number in range(1000))
    pickled = b"\x80\x04}(" + text(b"t") + text(b"a" * (1 << 20)) + b"q\x00" + text(b"e") + ENCODE + b"q\x01" + again + b"u."
    tracemalloc.start()
    read = read_plain(pickled, ["7"])
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert read == {"7": b"a" * (1 << 20)}

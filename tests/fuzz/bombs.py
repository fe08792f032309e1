"""Small inputs that ask for much memory or time, and the bounds that are promised."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lz4.frame
import msgpack
import numpy as np
import torch

from data.records import MAX_ARRAY_BYTES
from data.sources import region_tsv as tsv
from data.sources.plain_pickle import read_plain
from data.sources.region_files import load_npz
from tests.fuzz.checkpoints import pickle_of, saved, with_pickle
from tests.fuzz.records import image_reader, text_reader
from tests.fuzz.sandbox import Outcome, Sandbox
from tests.fuzz.target import MIB, SECONDS
from utils.errors import InputError
from utils.files import read_json
from utils.tensors import load_tensors

TEXT, IMAGE, ZIPPED, PICKLE, TENSORS = 448 * MIB, 512 * MIB, 512 * MIB, 320 * MIB, 128 * MIB
JSON_BYTES_PER_BYTE = 40
_STRINGS = b"\x81\xa1a" + (b"\xdc\x10\x00" + b"\xa2ab" * 4095) * 1000 + b"\xc0"  # each list ends with the next one


@dataclass(frozen=True)
class Bomb:
    """An input that must be read, or refused by one of ``errors``, within ``memory`` bytes."""

    name: str
    read: Callable[[bytes], object]
    data: bytes
    memory: int
    errors: tuple[type[Exception], ...] = (InputError,)

    def run(self) -> Outcome:
        """What it comes to, in a process of its own."""
        with Sandbox(self.read, self.errors, self.memory, SECONDS, b"") as sandbox:
            return sandbox.run(self.data)


def _array32(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


def raw_zip(members: dict[str, tuple[bytes, int]], shared: bool = False) -> bytes:
    """A zip of members, each a deflate stream and how many bytes it is said to hold; ``shared``: all are the first one."""
    body, directory = b"", b""
    for name, (stream, size) in members.items():
        place = 0 if shared else len(body)
        sizes = struct.pack("<HHHIIIHH", 8, 0, 33, _checksum(stream, size), len(stream), size, len(name), 0)
        if place == len(body):
            body += b"PK\x03\x04" + struct.pack("<HH", 20, 0) + sizes + name.encode() + stream
        directory += b"PK\x01\x02" + struct.pack("<HHH", 20, 20, 0) + sizes + struct.pack("<HHHII", 0, 0, 0, 0, place)
        directory += name.encode()
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


@cache
def _checksum(stream: bytes, size: int) -> int:
    """That of as many bytes as are said to be there, so that a lie is not found out by it; of no more than are ever read."""
    return zlib.crc32(zlib.decompressobj(-15).decompress(stream, min(size, MAX_ARRAY_BYTES)))


@cache
def zeros(mebibytes: int, before: bytes = b"") -> bytes:
    """A deflate stream of zeros, put together of one for a mebibyte, with something before them."""
    first, one = (zlib.compressobj(wbits=-15) for _ in range(2))
    blocks = one.compress(bytes(1 << 20)) + one.flush(zlib.Z_FULL_FLUSH)
    return first.compress(before) + first.flush(zlib.Z_FULL_FLUSH) + blocks * mebibytes + b"\x03\x00"


def zeros_of(shape: str, mebibytes: int = 0) -> tuple[bytes, int]:
    """An ``.npy`` of doubles as a deflate stream, and its size; ``shape`` as its header says it."""
    header = f"{{'descr': '>f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    before = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    return zeros(mebibytes, before), len(before) + (mebibytes << 20)


def text_bombs() -> list[Bomb]:
    """Records of texts."""
    read, _ = text_reader()
    size = (16 << 20) - 1000
    compressor = lz4.frame.LZ4FrameCompressor()
    frame = compressor.begin(1 << 60) + compressor.compress(bytes(1000)) + bytes(4)
    packed = {
        "17 MiB of zeros": bytes(17 << 20),
        "256 MiB of zeros": bytes(256 << 20),
        "a list of 2^32 - 1": b"\x81\xa1a" + _array32(2**32 - 1) + b"\xc0" * 1000,
        "16 million empty lists": b"\x81\xa1a" + _array32(size) + b"\x90" * size,
        "a thousand lists, each as long as may be": b"\x81\xa1a" + b"\xdc\x10\x00" * 1000 + b"\xc0" * (size - 3000),
        "the most strings that are let through": _STRINGS,
        "lists within lists": b"\x91" * size,
        "maps within maps": b"\x81\x01" * (size // 2),
    }
    bombs = [Bomb(f"text: {name}", read, lz4.frame.compress(content), TEXT) for name, content in packed.items()]
    return [
        *bombs,
        Bomb("text: a frame that says it holds 2^60 bytes", read, frame, TEXT),
        Bomb("text: 64 MiB behind a frame", read, lz4.frame.compress(b"\x80") + bytes(64 << 20), 136 * MIB),
    ]


def image_bombs() -> list[Bomb]:
    """Records of images, plain and compressed."""
    plain, zipped = image_reader(compressed=False), image_reader(compressed=True)

    def field(kind: bytes = b"<f2", shape: object = (1,), content: bytes = b"12") -> bytes:
        fields = {b"nd": True, b"type": kind, b"kind": b"", b"shape": shape, b"data": content}
        return bytes(msgpack.packb({b"features": fields, b"norm_bb": fields}))

    def both(stream: bytes, size: int) -> bytes:
        return raw_zip({"features.npy": (stream, size), "norm_bb.npy": (stream, size)})

    size = 16 << 20
    messages = {
        "a list of 2^32 - 1": b"\x81\xa1a" + _array32(2**32 - 1) + b"\xc0" * 1000,
        "16 million empty lists": b"\x81\xa1a" + _array32(size) + b"\x90" * size,
        "the most strings that are let through": _STRINGS,
        "65 MiB": b"\x81\xa1a\xc6" + struct.pack(">I", 65 << 20) + bytes(65 << 20),
        "a type of a million fields": field(b"f8," * 1_000_000),
        "a shape of 4,000 numbers of 64 bits": field(shape=[2**63] * 4000),
        "a shape of 2^64 - 1 times nothing": field(shape=[0, 2**64 - 1], content=b""),
    }
    zips = {
        "1 GiB of zeros": both(zeros(1024), 1 << 30),
        "1 GiB that says it is 1,000 bytes": both(zeros(1024), 1000),
        "1 GiB that says it is 60 MiB": both(zeros(1024), 60 << 20),
        "1 MiB that says it is 60 MiB": both(zeros(1), 60 << 20),
        "two arrays of 63 MiB": both(*zeros_of(f"(1, {63 << 17})", 63)),
        "5,000 names of one stream": raw_zip(
            {f"{name}.npy": (zeros(60), 60 << 20) for name in ("features", "norm_bb", *range(5000))}, shared=True
        ),
        "an array of 10^24": both(*zeros_of("(10000000000000000000000000,)")),
        "a header of parentheses": both(*zeros_of("(" * 9000)),
        "a header of signs": both(*zeros_of("-" * 9000 + "1")),
    }
    bombs = [Bomb(f"image, msgpack: {name}", plain, content, IMAGE) for name, content in messages.items()]
    return [*bombs, *(Bomb(f"image, npz: {name}", zipped, content, ZIPPED) for name, content in zips.items())]


def source_bombs(folder: Path) -> list[Bomb]:
    """What converters read."""
    path = folder / "bomb"

    def read_file_as_json(data: bytes) -> None:
        path.write_bytes(data)
        read_json(path)

    def read_long_row(data: bytes) -> None:
        path.write_bytes(data)
        os.truncate(path, 256 << 20)
        for source in tsv.sources_of(path, tsv.KINDS[2], {}):
            source.load()

    def read_npz(data: bytes) -> None:
        path.write_bytes(data)
        load_npz(path)

    def read_pickle(data: bytes) -> None:
        read_plain(data, ["a"])

    lists = 300_000
    laughs = b"\x80\x04)\x94" + b"".join(b"(" + b"h%c" % level * 10 + b"t\x94" for level in range(9)) + b"."
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros((1, 1)), info=np.array({"a": "b" * (60 << 20)}, dtype=object))
    info = io.BytesIO()
    np.save(info, np.array({"objects_conf": np.zeros(1, np.float32)}, dtype=object))
    member = zeros_of(f"(1, {63 << 17})", 63)
    uniter = {f"{name}.npy": member for name in ("features", "norm_bb", "conf", "soft_labels", "nbb")}
    milvlg = {f"{name}.npy": member for name in ("x", "bbox", "num_bbox", "image_w", "image_h")}
    milvlg["info.npy"] = zeros(0, info.getvalue()), len(info.getvalue())
    documented = (ValueError,)
    return [
        Bomb("TSV: a row of 256 MiB", read_long_row, b"a\t", 96 * MIB, documented),
        Bomb("JSON: lists within lists", read_file_as_json, b"[" * (10 << 20), 96 * MIB),
        Bomb("JSON: a number of ten million digits", read_file_as_json, b"9" * 10_000_000, 96 * MIB),
        Bomb("JSON: 300,000 lists", read_file_as_json, b"[" + b"[]," * lists + b"[]]", 3 * lists * JSON_BYTES_PER_BYTE),
        Bomb("pickle: tuples of ten, nine deep", read_pickle, laughs, PICKLE, documented),
        Bomb("pickle: 300,000 lists", read_pickle, b"\x80\x04" + b"]" * 300_000 + b".", PICKLE, documented),
        Bomb("npz with a pickle of 60 MiB", read_npz, stream.getvalue(), ZIPPED, documented),
        Bomb("npz of UNITER's extractor, five arrays of 63 MiB", read_npz, raw_zip(uniter), ZIPPED, documented),
        Bomb("npz of MILVLG's extractor, five arrays of 63 MiB", read_npz, raw_zip(milvlg), ZIPPED, documented),
    ]


def tensor_bombs(folder: Path) -> list[Bomb]:
    """Checkpoints."""
    path = folder / "model.pt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_tensors(path)

    def calling(name: bytes, count: int) -> bytes:
        return b"\x80\x02c" + name + b"\n\x8a\x08" + struct.pack("<q", count) + b"\x85R."

    weights = {"weight": torch.zeros(1000)}
    archive = saved(weights)
    pickled, count = pickle_of(archive), b"M" + struct.pack("<H", 1000)
    assert pickled.count(count) == 2  # of the storage and of the shape
    huge = b"J" + struct.pack("<i", 10**9)
    pickles = {
        "bytearray(8 * 10^9)": calling(b"builtins\nbytearray", 8 * 10**9),
        "FloatTensor(10^10)": calling(b"torch\nFloatTensor", 10**10),
        "a storage of 10^9": pickled.replace(count, huge),
        "place 2^31 - 1 of the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "text of 2^32 - 1 bytes": b"\x80\x02X\xff\xff\xff\xff.",
        "tuples within each other": b"\x80\x02)" + b"\x85" * 300_000 + b".",
        "490,000 maps": b"\x80\x02" + b"}" * 490_000 + b".",
        "two million maps": b"\x80\x02" + b"}" * 2_000_000 + b".",
    }
    tensors = {f"zip: {name}": with_pickle(archive, content) for name, content in pickles.items()}
    described = zlib.compress(pickled.replace(count, huge), wbits=-15), len(pickled) + 4
    tensors["zip: 1 GiB of zeros"] = raw_zip({"a/data.pkl": described, "a/data/0": (zeros(1024), 1 << 30)})
    tensors["before torch 1.6: a storage of 10^9"] = saved(weights, legacy=True).replace(count, huge)
    return [Bomb(f"checkpoint, {name}", read, data, TENSORS) for name, data in tensors.items()]


BOMBS: dict[str, Callable[[Path], list[Bomb]]] = {
    "texts": lambda folder: text_bombs(),
    "images": lambda folder: image_bombs(),
    "sources": source_bombs,
    "tensors": tensor_bombs,
}

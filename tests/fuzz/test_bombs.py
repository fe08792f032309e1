"""Small inputs that ask for much memory or time get neither; and what must not happen is found when it does."""

from __future__ import annotations

import copy
import io
import os
import signal
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import lz4.frame
import msgpack
import numpy as np
import torch

from data.records import MAX_ARRAY_BYTES
from data.sources import region_tsv as tsv
from data.sources.region_files import load_npy_pair, load_npz
from tests.data.sources.detectors import Detected, save_mmf
from tests.fuzz.sandbox import MIB, Errors, Read, Sandbox
from tests.fuzz.test_fuzz import image_reader, pickle_of, saved, text_reader, with_pickle
from utils.errors import InputError
from utils.files import read_json
from utils.tensors import load_tensors


def bombs(kind: str, read: Read, memory: int, inputs: dict[str, bytes], errors: Errors = (InputError,)) -> None:
    """Have inputs read, or refused by one of ``errors``, while the process grows by at most ``memory`` bytes."""
    for name, data in inputs.items():
        with Sandbox(read, errors, memory) as sandbox:
            outcome, detail, seconds, peak = sandbox.run(data)
        limits = f"{1000 * seconds:.0f} ms | {peak // MIB} MiB | {memory // MIB} MiB"
        print(f"| {kind}: {name} | {len(data):,} | {'refused' if outcome == 'error' else outcome} | {limits} |")
        assert outcome != "finding", (name, detail)
        assert peak <= memory, (name, peak)


def raw_zip(members: dict[str, tuple[bytes, int]], shared: Collection[str] = ()) -> bytes:
    """A zip of members, each a deflate stream and the size that it claims; the ``shared`` ones have the last one's bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (stream, size) in members.items():
            archive.writestr(name, stream)
            info = archive.getinfo(name)
            info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, size, _checksum(stream, size)
        for name in shared:
            archive.filelist.append(copy.copy(info))
            archive.filelist[-1].filename = name
    return file.getvalue()


@cache
def _checksum(stream: bytes, size: int) -> int:
    """The checksum of as many bytes as are claimed, so that it does not give a lie away; of no more than are ever read."""
    return zlib.crc32(zlib.decompressobj(-15).decompress(stream, min(size, MAX_ARRAY_BYTES)))


@cache
def zeros(mebibytes: int, before: bytes = b"") -> bytes:
    """A deflate stream of zeros, joined from one of a mebibyte, with something before them."""
    first, one = (zlib.compressobj(wbits=-15) for _ in range(2))
    blocks = one.compress(bytes(1 << 20)) + one.flush(zlib.Z_FULL_FLUSH)
    return first.compress(before) + first.flush(zlib.Z_FULL_FLUSH) + blocks * mebibytes + b"\x03\x00"


def zeros_npy(shape: str, mebibytes: int = 0) -> tuple[bytes, int]:
    """An ``.npy`` of doubles as a deflate stream, and its size; ``shape`` is the text in its header."""
    header = f"{{'descr': '>f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    before = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    return zeros(mebibytes, before), len(before) + (mebibytes << 20)


SIZE = (16 << 20) - 1000  # nearly the longest record of a text
LONG_LIST = b"\x81\xa1a\xdd" + struct.pack(">I", 2**32 - 1) + b"\xc0" * 1000
EMPTY_LISTS = b"\x81\xa1a\xdd" + struct.pack(">I", SIZE) + b"\x90" * SIZE
MOST_STRINGS = b"\x81\xa1a" + (b"\xdc\x10\x00" + b"\xa2ab" * 4095) * 1000 + b"\xc0"  # each list ends with the next one


def test_texts() -> None:
    contents = {
        "17 MiB of zeros": bytes(17 << 20),
        "256 MiB of zeros": bytes(256 << 20),
        "a list of 2^32 - 1": LONG_LIST,
        "16 million empty lists": EMPTY_LISTS,
        "a thousand lists of maximum length": b"\x81\xa1a" + b"\xdc\x10\x00" * 1000 + b"\xc0" * (SIZE - 3000),
        "the most strings within the limits": MOST_STRINGS,
        "lists within lists": b"\x91" * SIZE,
        "maps within maps": b"\x81\x01" * (SIZE // 2),
    }
    compressor = lz4.frame.LZ4FrameCompressor()
    frame = compressor.begin(1 << 60) + compressor.compress(bytes(1000)) + bytes(4)
    frames = {name: lz4.frame.compress(content) for name, content in contents.items()}
    bombs("text", text_reader(), 448 * MIB, {**frames, "a frame that claims 2^60 bytes": frame})
    bombs("text", text_reader(), 8 * MIB, {"64 MiB after a frame": lz4.frame.compress(b"\x80") + bytes(64 << 20)})


def test_images(tmp_path: Path) -> None:
    def fields(kind: bytes = b"<f2", shape: object = (1,), content: bytes = b"12") -> bytes:
        array = {b"nd": True, b"type": kind, b"kind": b"", b"shape": shape, b"data": content}
        return bytes(msgpack.packb({b"features": array, b"norm_bb": array}))

    def both(stream: bytes, size: int) -> bytes:
        return raw_zip({"features.npy": (stream, size), "norm_bb.npy": (stream, size)})

    records = {
        "a list of 2^32 - 1": LONG_LIST,
        "16 million empty lists": EMPTY_LISTS,
        "the most strings within the limits": MOST_STRINGS,
        "65 MiB": b"\x81\xa1a\xc6" + struct.pack(">I", 65 << 20) + bytes(65 << 20),
        "a type of a million fields": fields(b"f8," * 1_000_000),
        "a shape of 4,000 numbers of 64 bits": fields(shape=[2**63] * 4000),
        "a shape of 2^64 - 1 times nothing": fields(shape=[0, 2**64 - 1], content=b""),
    }
    bombs("image, msgpack", image_reader(tmp_path, compressed=False), 512 * MIB, records)
    names = ["norm_bb.npy", *(f"{number}.npy" for number in range(5000))]
    zips = {
        "1 GiB of zeros": both(zeros(1024), 1 << 30),
        "1 GiB that claims 1,000 bytes": both(zeros(1024), 1000),
        "1 GiB that claims 60 MiB": both(zeros(1024), 60 << 20),
        "1 MiB that claims 60 MiB": both(zeros(1), 60 << 20),
        "two arrays of 63 MiB": both(*zeros_npy(f"(1, {63 << 17})", 63)),
        "5,000 names of one stream": raw_zip({"features.npy": (zeros(60), 60 << 20)}, names),
        "an array of 10^24": both(*zeros_npy("(10000000000000000000000000,)")),
        "a header of parentheses": both(*zeros_npy("(" * 9000)),
        "a header of signs": both(*zeros_npy("-" * 9000 + "1")),
    }
    bombs("image, npz", image_reader(tmp_path, compressed=True), 512 * MIB, zips)


def test_sources(tmp_path: Path) -> None:
    """What converters read."""
    path, info = tmp_path / "bomb.npy", tmp_path / "bomb_info.npy"

    def reading(load: Callable[[Path], object], path: Path = path) -> Read:
        return lambda data: (path.write_bytes(data), load(path))

    def read_long_row(path: Path) -> None:
        os.truncate(path, 256 << 20)
        for source in tsv.sources_of(path, tsv.KINDS[2], {}):
            source.load()

    documented = (ValueError,)
    bombs("TSV", reading(read_long_row), 96 * MIB, {"a row of 256 MiB": b"a\t"}, documented)
    texts = {"lists within lists": b"[" * (10 << 20), "a number of ten million digits": b"9" * 10_000_000}
    bombs("JSON", reading(read_json), 96 * MIB, texts)
    lists = b"[" + b"[]," * 300_000 + b"[]]"
    bombs("JSON", reading(read_json), 40 * len(lists), {"300,000 lists": lists})

    save_mmf(path, Detected(0))
    header = info.read_bytes()[: info.read_bytes().index(b"\n") + 1]
    laughs = b")\x94" + b"".join(b"(" + b"h%c" % level * 10 + b"t\x94" for level in range(9))
    pickles = {"tuples of ten, nine deep": laughs, "300,000 lists": b"]" * 300_000}
    inputs = {name: header + b"\x80\x04" + data + b"." for name, data in pickles.items()}
    bombs("pickle", reading(lambda _: load_npy_pair(path), info), 320 * MIB, inputs, documented)
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros((1, 1)), info=np.array({"a": "b" * (60 << 20)}, dtype=object))
    member = zeros_npy(f"(1, {63 << 17})", 63)
    uniter = {f"{name}.npy": member for name in ("features", "norm_bb", "conf", "soft_labels", "nbb")}
    milvlg = {f"{name}.npy": member for name in ("x", "bbox", "num_bbox", "image_w", "image_h")}
    np.save(info, np.array({"objects_conf": np.zeros(1, np.float32)}, object))
    milvlg["info.npy"] = zeros(0, info.read_bytes()), len(info.read_bytes())
    inputs = {
        "a pickle of 60 MiB": stream.getvalue(),
        "five arrays of 63 MiB, as of UNITER's extractor": raw_zip(uniter),
        "five arrays of 63 MiB, as of MILVLG's extractor": raw_zip(milvlg),
    }
    bombs("npz", reading(load_npz), 512 * MIB, inputs, documented)


def test_tensors(tmp_path: Path) -> None:
    """Checkpoints."""
    path = tmp_path / "model.pt"

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
        "index 2^31 - 1 of the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "text of 2^32 - 1 bytes": b"\x80\x02X\xff\xff\xff\xff.",
        "tuples within each other": b"\x80\x02)" + b"\x85" * 300_000 + b".",
        "490,000 maps": b"\x80\x02" + b"}" * 490_000 + b".",
        "two million maps": b"\x80\x02" + b"}" * 2_000_000 + b".",
    }
    described = zlib.compress(pickled.replace(count, huge), wbits=-15), len(pickled) + 4
    inputs = {
        **{f"zip: {name}": with_pickle(archive, content) for name, content in pickles.items()},
        "zip: 1 GiB of zeros": raw_zip({"a/data.pkl": described, "a/data/0": (zeros(1024), 1 << 30)}),
        "before torch 1.6: a storage of 10^9": saved(weights, legacy=True).replace(count, huge),
    }
    bombs("checkpoint", read, 128 * MIB, inputs)


def test_what_must_not_happen_is_found() -> None:
    misbehaviour: dict[bytes, Callable[[], object]] = {
        b"died of SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        b"took over 0.2 seconds": lambda: time.sleep(60),
        b"MemoryError": lambda: bytearray(1 << 30),
        b"a message of 1000": lambda: float("x" * 100_000),
        b"KeyError": lambda: {}["other"],
        b"": list,
    }
    with Sandbox(lambda data: misbehaviour[data](), (ValueError,), 64 * MIB, 0.2) as sandbox:
        for detail in misbehaviour:
            for _ in range(2):
                outcome = sandbox.run(detail)
                assert outcome.kind == ("finding" if detail else "result")
                assert outcome.detail.startswith(detail.decode())
            assert sandbox.run(b"").kind == "result"

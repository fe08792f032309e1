"""The check of LMDB's pages: sound files of every shape pass, each kind of damage is named, and what passes can be read."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import lmdb
import pytest

from data.lmdb_store import LmdbWriter
from data.pages import check_pages
from tests.conftest import Golden
from tests.fuzz.databases import META, PAGE, SHAPES, make
from utils.errors import InputError

# Fields of the meta page: of the free and the main database and of the whole file.
FREE_FLAGS, FREE_ROOT = META + 28, META + 64
FLAGS, DEPTH, ENTRIES, ROOT = META + 76, META + 78, META + 104, META + 112
LAST_PAGE, TRANSACTION = META + 120, META + 128


@pytest.mark.parametrize("shape", SHAPES)
def test_sound_files_of_every_shape_pass(shape: str, tmp_path: Path) -> None:
    check_pages(make(tmp_path / "db", SHAPES[shape]))


def test_golden_databases_pass(golden: Golden, bundled: Golden) -> None:
    files = {file for folder in (golden.folder, bundled.folder) for file in (folder / "db").rglob("data.mdb")}
    assert len(files) >= 2
    for file in files:
        check_pages(file)


def test_our_own_writer_passes_with_many_records_rewritten_in_any_order(tmp_path: Path) -> None:
    numbers = list(range(40_000))
    random.Random(0).shuffle(numbers)
    with LmdbWriter(tmp_path / "db") as writer:
        for number in numbers:
            writer.put(f"{number:0{8 + number % 40}d}", b"x" * (number % 30))
    with lmdb.open(str(tmp_path / "db"), lock=False, readonly=True) as environment:
        assert environment.stat()["depth"] >= 3
    check_pages(tmp_path / "db/data.mdb")
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 30, lock=False, sync=False) as environment:
        for start in range(2):
            with environment.begin(write=True) as transaction:
                for key in list(transaction.cursor().iternext(values=False))[start::9]:
                    transaction.delete(key)
                    transaction.put(key[::-1], b"y" * random.Random(key).randrange(6000))
    check_pages(tmp_path / "db/data.mdb")


class Damage:
    """A sound file to write numbers into, and what its pages are."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data = bytearray(file.read_bytes())
        self.meta = PAGE if self.number(PAGE + TRANSACTION, "Q") > self.number(TRANSACTION, "Q") else 0
        self.root = PAGE * self.number(self.meta + ROOT, "Q")

    def number(self, place: int, code: str) -> int:
        return int(struct.unpack_from(f"<{code}", self.data, place)[0])

    def set(self, place: int, code: str, number: int) -> Damage:
        struct.pack_into(f"<{code}", self.data, place, number)
        return self

    def node(self, page: int, index: int) -> int:
        """Where a node is in the file."""
        return page + self.number(page + 16 + 2 * index, "H")

    def key(self, node: int) -> slice:
        return slice(node + 8, node + 8 + self.number(node + 6, "H"))

    def child(self, page: int, index: int) -> int:
        """Where the page is that a node of branch ``page`` leads to."""
        return PAGE * self.number(self.node(page, index), "I")

    def refused(self, message: str) -> None:
        self.file.write_bytes(self.data)
        with pytest.raises(InputError, match=rf"data\.mdb: {message}"):
            check_pages(self.file)


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    """A file of three levels: a root, branches, leaves."""
    return Damage(make(tmp_path / "db", SHAPES["deep"]))


@pytest.fixture
def large(tmp_path: Path) -> Damage:
    """A file of one leaf with values on overflow pages."""
    return Damage(make(tmp_path / "db", SHAPES["large values"]))


def test_no_file_and_no_pages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.mdb: no such file"):
        check_pages(tmp_path / "data.mdb")
    for content in (b"", b"x" * 100, b"x" * 10_000):
        (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(InputError, match=r"data.mdb: page 0: (cut short|has flags)"):
            check_pages(tmp_path / "data.mdb")


@pytest.mark.parametrize("page", [0, 1])
def test_damaged_meta_pages(damage: Damage, page: int) -> None:
    start = page * PAGE
    sound = bytes(damage.data)
    for place, code, number, message in [
        (10, "H", 2, "has flags 0x2, expected a meta page"),
        (META, "I", 1, "has magic 0x1 "),
        (META + 4, "I", 999, "has magic 0xbeefc0de and data version 999"),
        (META + 24, "I", 4000, "has a page size of 4,000, expected a power of two"),
        (META + 24, "I", 65536, "has a page size of 65,536"),
        (FREE_FLAGS, "H", 0, "has databases with flags 0x0 and 0x0, expected a plain one"),
        (FLAGS, "H", 4, "has databases with flags 0x4 and 0x8"),
    ]:
        damage.set(start + place, code, number).refused(f"page {page}: {message}")
        damage.data[:] = sound
    del damage.data[start + 100 :]
    damage.refused(f"page {page}: cut short")


def test_meta_pages_that_contradict_each_other_or_the_file(damage: Damage) -> None:
    other = PAGE - damage.meta
    sound = bytes(damage.data)
    damage.set(PAGE + META + 24, "I", 8192).refused("page 1: has a page size of 8,192, page 0 one of 4,096")
    damage.data[:] = sound
    # The one that does not count may say what it likes of its own, older pages.
    damage.set(other + ROOT, "Q", 10**6).set(other + LAST_PAGE, "Q", 10**6)
    damage.file.write_bytes(damage.data)
    check_pages(damage.file)
    damage.set(other + TRANSACTION, "Q", 2**60).refused(f"page {other // PAGE}: the file has")
    for last in (0, len(sound) // PAGE, 2**63, 2**64 - 1):
        damage.data[:] = sound
        damage.set(damage.meta + LAST_PAGE, "Q", last).refused(f"page {damage.meta // PAGE}: the file has")
    damage.data[:] = sound[:-1]
    damage.refused(f"page {damage.meta // PAGE}: the file has")


def test_trees_that_are_not_as_described(damage: Damage) -> None:
    sound = bytes(damage.data)
    for place, code, number, message in [
        (ENTRIES, "Q", 71, "main database: has 70 entries, its meta page says 71"),
        (DEPTH, "H", 2, r"page \d+: has flags 0x1, expected a leaf page"),
        (DEPTH, "H", 4, r"page \d+: has flags 0x2, expected a branch page"),
        (DEPTH, "H", 0, "main database: has 0 levels"),
        (DEPTH, "H", 33, "main database: has 33 levels"),
        (ROOT, "Q", 0, "page 0: reached twice"),
        (ROOT, "Q", 10**9, "page 1000000000: outside the file"),
        (ROOT, "Q", 2**64 - 1, "main database: has no root, but 70 entries on 3 levels"),
        (FREE_ROOT, "Q", damage.root // PAGE, "free database: has 0 levels"),
    ]:
        damage.set(damage.meta + place, code, number).refused(message)
        damage.data[:] = sound


def test_free_database_is_walked_too(tmp_path: Path) -> None:
    damage = Damage(make(tmp_path / "db", SHAPES["rewritten"]))
    sound = bytes(damage.data)
    root = damage.number(damage.meta + FREE_ROOT, "Q")
    damage.set(damage.meta + FREE_ROOT, "Q", damage.root // PAGE).refused(f"page {damage.root // PAGE}: reached twice")
    damage.data[:] = sound
    damage.set(damage.node(root * PAGE, 0) + 6, "H", 6).refused(f"page {root}: has keys that are not numbers of 8 bytes")
    damage.data[:] = sound
    damage.set(damage.node(root * PAGE, 0) + 9, "H", 1).refused(f"page {root}: its keys are not in order")


def test_pages_of_the_wrong_kind_or_place(damage: Damage) -> None:
    sound = bytes(damage.data)
    page = damage.child(damage.root, 0)
    damage.set(page, "Q", 99).refused(f"page {page // PAGE}: says that it is page 99")
    for flags in (0, 2, 3, 4, 0x21):
        damage.data[:] = sound
        damage.set(page + 10, "H", flags).refused(f"page {page // PAGE}: has flags {flags:#x}, expected a branch page")
    for target, message in [
        (page // PAGE, f"page {page // PAGE}: reached twice"),
        (damage.root // PAGE, f"page {damage.root // PAGE}: reached twice"),
        (0, "page 0: reached twice"),
        (10**9, "page 1000000000: outside the file"),
    ]:
        damage.data[:] = sound
        damage.set(damage.node(damage.root, 1), "I", target).refused(message)
    damage.data[:] = sound
    damage.set(damage.node(damage.root, 1) + 4, "H", 1).refused(r"page 42949\d+: outside the file")


@pytest.mark.parametrize(
    ("lower", "upper"), [(0, 4096), (16, 4096), (18, 4096), (21, 100), (200, 100), (30, 5000), (65534, 65535)]
)
def test_bounds_of_a_page(damage: Damage, lower: int, upper: int) -> None:
    damage.set(damage.root + 12, "H", lower).set(damage.root + 14, "H", upper)
    damage.refused(
        f"page {damage.root // PAGE}: has lower {lower} and upper {upper}, expected room for 2 or more nodes in 4096"
    )


def test_nodes_out_of_place(damage: Damage) -> None:
    sound = bytes(damage.data)
    number = damage.root // PAGE
    for offset in (0, 16, 4090, 65534, damage.number(damage.root + 16, "H") + 1):
        damage.set(damage.root + 16, "H", offset).refused(f"page {number}: has a node out of place")
        damage.data[:] = sound
    damage.set(damage.root + 18, "H", damage.number(damage.root + 16, "H")).refused(f"page {number}: ")
    damage.data[:] = sound
    leaf = damage.child(damage.child(damage.root, 0), 0)
    node = damage.node(leaf, 1)
    for place, width, value, message in [
        (0, "I", 9000, rf"the node at {node - leaf} ends at \d+, outside the page"),
        (0, "I", 2**32 - 1, rf"the node at {node - leaf} ends at \d+, outside the page"),
        (0, "I", 100, "its nodes overlap"),
        (4, "H", 2, f"the node at {node - leaf} has flags 0x2, expected a plain value"),
        (4, "H", 4, f"the node at {node - leaf} has flags 0x4, expected a plain value"),
        (6, "H", 0, f"the node at {node - leaf} has a key of 0 bytes, expected 1 to 511"),
        (6, "H", 512, f"the node at {node - leaf} has a key of 512 bytes"),
    ]:
        damage.set(node + place, width, value).refused(f"page {leaf // PAGE}: {message}")
        damage.data[:] = sound


def test_keys_out_of_order(damage: Damage) -> None:
    sound = bytes(damage.data)
    branch = damage.child(damage.root, 1)
    leaf = damage.child(branch, 1)
    wrong = rf"page {leaf // PAGE}: its keys are not in order, or not between those of the page above"
    first, second = damage.node(leaf, 0), damage.node(leaf, 1)
    offsets = damage.number(leaf + 16, "H"), damage.number(leaf + 18, "H")
    damage.set(leaf + 16, "H", offsets[1]).set(leaf + 18, "H", offsets[0]).refused(wrong)  # two of one page change places
    damage.data[:] = sound
    damage.data[damage.key(second)] = damage.data[damage.key(first)]
    damage.refused(wrong)  # one key twice
    damage.data[:] = sound
    damage.data[first + 8] = 1
    damage.refused(wrong)  # less than the key that leads here
    damage.data[:] = sound
    damage.data[damage.node(leaf, damage.number(leaf + 12, "H") // 2 - 9) + 8] = 255
    damage.refused(wrong)  # not less than the key that leads to the next page
    damage.data[:] = sound
    damage.data[damage.node(branch, 1) + 8] = 1
    damage.refused(rf"page {branch // PAGE}: its keys are not in order")


def test_values_on_overflow_pages(large: Damage) -> None:
    sound = bytes(large.data)
    nodes = [large.node(large.root, index) for index in range((large.number(large.root + 12, "H") - 16) // 2)]
    big = [node for node in nodes if large.number(node + 4, "H") == 1]
    pointer = large.key(big[0]).stop
    first, needed = large.number(pointer, "Q"), large.number(PAGE * large.number(pointer, "Q") + 12, "I")
    other = large.number(large.key(big[1]).stop, "Q")
    taken = f"the .* bytes of its value take {needed}"
    for place, code, value, message in [
        (big[0], "I", needed * PAGE, f"page {first}: (has {needed} overflow pages, the .* bytes|reached twice, or one of)"),
        (big[0], "I", 2**32 - 1, f"page {first}: outside the file, or its 1048577 pages are"),
        (pointer, "Q", other, f"page {other}: reached twice"),
        (pointer, "Q", 1, "page 1: reached twice"),
        (pointer, "Q", 2**64 - 1, f"page {2**64 - 1}: outside the file"),
        (PAGE * first, "Q", 7, f"page {first}: says that it is page 7"),
        (PAGE * first + 10, "H", 2, f"page {first}: has flags 0x2, expected an overflow page"),
        (PAGE * first + 12, "I", needed - 1, f"page {first}: has {needed - 1} overflow pages, {taken}"),
    ]:
        large.set(place, code, value).refused(message)
        large.data[:] = sound


def test_databases_of_databases_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "db"), max_dbs=1, lock=False) as environment:
        environment.open_db(b"inner")
    with pytest.raises(InputError, match=r"page \d+: the node at \d+ has flags 0x2, expected a plain value"):
        check_pages(tmp_path / "db/data.mdb")


def test_room_that_is_not_in_use_costs_nothing(large: Damage) -> None:
    os.truncate(large.file, 1 << 36)
    check_pages(large.file)
    with open(large.file, "r+b") as stream:
        stream.seek(large.meta + LAST_PAGE)
        stream.write(struct.pack("<Q", (1 << 36) // PAGE - 1))
    check_pages(large.file)

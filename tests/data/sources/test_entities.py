"""Marked captions and boxes: by hand, as the drawn scenes have them, damaged, and hostile."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.sources import entities
from data.sources.entities import MAX_BOXES, MAX_BYTES, parse_caption, picture_names, read_annotated
from examples.scenes.dataset import Recipe, captions_of, make_scenes, plan, scene_of
from examples.scenes.scene import HEIGHT, WIDTH
from utils.errors import InputError

LINE = "[/EN#7/people/clothing Two men] in [/EN#8/clothing green shirts] wave [/EN#0/notvisual something] ."
XML = """<annotation>
  <filename>1.jpg</filename>
  <size><width>400</width><height>200</height><depth>3</depth></size>
  <object><name>7</name>
    <name>8</name>
    <bndbox><xmin>100</xmin><ymin>50</ymin><xmax>200</xmax><ymax>150</ymax></bndbox></object>
  <object><name>7</name><bndbox><ymax>200</ymax><xmax>400</xmax><ymin>0</ymin><xmin>0</xmin></bndbox></object>
  <object><name>9</name><scene>1</scene><nobndbox>1</nobndbox></object>
  <object><name>10</name><scene>0</scene><nobndbox>1</nobndbox></object>
</annotation>
"""


def test_words_and_phrases() -> None:
    words, phrases = parse_caption(LINE)
    assert words == ["Two", "men", "in", "green", "shirts", "wave", "something", "."]
    assert [(p.chain, p.types, words[p.words.start : p.words.stop]) for p in phrases] == [
        (7, ("people", "clothing"), ["Two", "men"]),
        (8, ("clothing",), ["green", "shirts"]),
        (0, ("notvisual",), ["something"]),
    ]
    assert parse_caption("[/EN#1/other ] x") == (["x"], [(1, ("other",), range(0, 0))])
    assert parse_caption("a dog") == (["a", "dog"], [])


def test_boxes_and_scenes(tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text(XML)
    boxes, scenes = entities.read_boxes(tmp_path / "1.xml")
    assert {chain: of_chain.tolist() for chain, of_chain in boxes.items()} == {
        7: [[0.25, 0.25, 0.5, 0.75], [0, 0, 1, 1]],
        8: [[0.25, 0.25, 0.5, 0.75]],
    }
    assert scenes == {9}


def test_drawn_scenes(tmp_path: Path) -> None:
    recipe = Recipe(seed=3)
    make_scenes(tmp_path / "scenes", {"train": 3, "val": 1, "test": 1}, recipe, 1)
    folder = tmp_path / "scenes/entities"
    annotations = json.loads((tmp_path / "scenes/dataset_scenes.json").read_text())["images"]
    assert picture_names(folder) == [entry["filename"].removesuffix(".jpg") for entry in annotations]
    for job, entry in zip(plan({"train": 3, "val": 1, "test": 1}, recipe), annotations, strict=True):
        scene = scene_of(job, recipe)
        annotated = read_annotated(folder, job.stem)
        plain = [" ".join(caption.words).replace(" ,", ",").replace(" .", ".") for caption in annotated.captions]
        assert plain == [sentence["raw"] for sentence in entry["sentences"]]
        drawn = [
            [phrase for phrase in caption.segments if not isinstance(phrase, str)]
            for caption in captions_of(job, scene, recipe)
        ]
        for caption, expected in zip(annotated.captions, drawn, strict=True):
            for phrase, of_items in zip(caption.phrases, expected, strict=True):
                assert " ".join(caption.words[phrase.words.start : phrase.words.stop]) == of_items.text
                boxes = [scene.items[item].box for item in of_items.items]
                if boxes:
                    found = annotated.boxes[phrase.chain] * [WIDTH, HEIGHT, WIDTH, HEIGHT]
                    np.testing.assert_allclose(found, boxes, atol=0.5 + 1e-9)
                else:
                    assert phrase.chain in annotated.scenes
                    assert phrase.chain not in annotated.boxes


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a [/EN#1/other red cross .", "the phrase of '[/EN#1/other' does not end"),
        ("a [/EN#1/other red [/EN#2/other cross]", "'[/EN#2/other' begins within the phrase of [/EN#1/other"),
        ("a red cross] .", "'cross]' ends a phrase, but none has begun"),
        ("[/EN#x/other a]", "'[/EN#x/other' found"),
        ("[/EN#1 a]", "'[/EN#1' found"),
        ("[ a", "'[' found"),
        (f"[/EN#{'9' * 4000}/other a]", "expected the start of a phrase"),
    ],
    ids=range(7),
)
def test_damaged_captions(tmp_path: Path, line: str, complaint: str) -> None:
    check_refusal(tmp_path / "1.txt", f"{LINE}\n\n{line}\n", 3, complaint)


@pytest.mark.parametrize(
    ("old", "new", "line", "complaint"),
    [
        ("</size>", "", 10, "mismatched tag"),
        ("<name>8</name>", "<name>eight</name>", 5, "name is 'eight'"),
        ("<xmin>100</xmin>", "<xmin>1.5</xmin>", 6, "xmin is '1.5'"),
        ("<xmin>100</xmin>", f"<xmin>{'9' * 5000}</xmin>", 6, "expected a whole number"),
        ("<xmin>100</xmin>", "", 6, "xmin is ''"),
        ("<xmin>100</xmin>", "<xmin>201</xmin>", 6, "bndbox from (201, 50) to (200, 150)"),
        ("<width>400</width>", "", 10, "size/width is ''"),
        ("<height>200</height>", "<height>0</height>", 10, "picture of 400 x 0 pixels"),
        ("annotation>", "scene>", 1, "element 'scene' found"),
        ("1.jpg", "&amp;&lol;", 2, "undefined entity"),
        ("1.jpg", "<a>" * 50_000, 2, "more than 50,000 elements"),
    ],
    ids=range(11),
)
def test_damaged_boxes(tmp_path: Path, old: str, new: str, line: int, complaint: str) -> None:
    check_refusal(tmp_path / "1.xml", XML.replace(old, new), line, complaint)


def test_missing_files(tmp_path: Path) -> None:
    sentences = tmp_path / "Sentences"
    with pytest.raises(InputError, match="Sentences: cannot be read"):
        picture_names(tmp_path)
    sentences.mkdir()
    with pytest.raises(InputError, match=r"no \.txt file in it"):
        picture_names(tmp_path)
    (sentences / "._1.txt").write_text("left by an archive of another system")
    check_refusal(sentences / "1.txt", b"\xef\xbb\xbfa dog\n\xff\n", 2, "'utf-8' codec can't decode")
    assert picture_names(tmp_path) == ["1"]
    (sentences / "1.txt").write_text("a dog\n")
    with pytest.raises(InputError, match=r"1\.xml: no such file"):
        read_annotated(tmp_path, "1")


ENTITIES = "".join(f"<!ENTITY a{n + 1} '{f'&a{n};' * 10}'>" for n in range(9))
BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
CHAINS = "<size><width>9</width><height>9</height></size><object>" + "<name>1</name>" * 1000 + BOX * (MAX_BOXES // 1000 + 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"<!DOCTYPE a [<!ENTITY a0 'ha'>{ENTITIES}]><annotation>&a9;</annotation>", "document type declared"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "{file}">]><annotation><a>&x;</a></annotation>', "document type declared"),
        ('<!DOCTYPE annotation SYSTEM "file://{file}"><annotation/>', "document type declared"),
        ("<annotation>" * (MAX_BYTES // 12), "more than 50,000 elements"),
        (f"<annotation>{'<a/>' * (MAX_BYTES // 4 - 8)}</annotation>", "more than 50,000 elements"),
        (f"<{'a' * (MAX_BYTES - 3)}/>", "expected 'annotation'"),
        ("<annotation " + " ".join(f"a{n}=''" for n in range(80_000)) + "/>", "size/width is ''"),
        (f"<annotation>{CHAINS}</object></annotation>", "more than 4,096 boxes"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "unknown encoding"),
        ('<?xml version="1.0" encoding="utf-7"?><annotation/>', "multi-byte encodings are not supported"),
        (" " * (MAX_BYTES + 1), "of at most 1,048,576"),
    ],
    ids=range(11),
)
def test_bombs(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "secret").write_text("secret")
    tracemalloc.start()
    started = time.process_time()
    check_refusal(tmp_path / "1.xml", content.replace("{file}", str(tmp_path / "secret")), None, complaint)
    seconds, most = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5
    assert most < 24 * MAX_BYTES


def check_refusal(path: Path, content: str | bytes, line: int | None, complaint: str) -> None:
    """Check that a file of this content is refused, in one short message that names it and the line."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(complaint)) as caught:
        (entities.read_boxes if path.suffix == ".xml" else entities.read_sentences)(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: " if line is None else f"{path}: line {line}: ")
    assert "\n" not in message
    assert len(message) < 1000

"""The model from Python: scores and maps against golden numbers and the naive twin, ranking, and errors."""

from __future__ import annotations

import inspect
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from data.boxes import BoxRule
from data.checks import check_vocabularies
from data.image_db import Image, ImageDatabase
from data.text_db import Text, TextDatabase
from evaluation import retriever as module
from evaluation.retriever import Ranked, Retriever
from tests import naive
from tests.conftest import BUNDLED, relative_error
from utils.errors import InputError

ROOT = Path(__file__).parents[2]
MODEL = BUNDLED.folder / "model.pt", BUNDLED.folder / "model.json"
CAPTION = "a dog catching a frisbee"
TEXTS, IMAGES = TextDatabase(BUNDLED.text_db), ImageDatabase(BUNDLED.image_db)
# The first texts and images of the golden matrix.
SOME = (
    [TEXTS[name] for name in BUNDLED.arrays["eval/txt_ids"][:12].tolist()],
    [IMAGES[name] for name in BUNDLED.arrays["eval/img_ids"][:15].tolist()],
)
SCORES = BUNDLED.arrays["eval/scores"][:12, :15]
IMAGE = SOME[1][0]
TEXTS.close()  # until the next look-up
IMAGES.close()


@pytest.fixture(scope="module")
def retriever() -> Iterator[Retriever]:
    yield Retriever.from_checkpoint(*MODEL, device="cpu")
    TEXTS.close()
    IMAGES.close()


def test_using_it_gives_golden_scores_and_changes_nothing(retriever: Retriever) -> None:
    before = {name: tensor.clone() for name, tensor in retriever.model.state_dict().items()}
    random, scores = torch.get_rng_state(), retriever.score(*SOME)
    assert scores.dtype == np.float32
    assert relative_error(scores, SCORES) < 1e-4
    retriever.attention(CAPTION, IMAGE)
    retriever.rank(CAPTION, IMAGES)
    assert np.array_equal(retriever.score(*SOME), scores)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not any(module.training for module in retriever.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in retriever.model.state_dict().items())


@pytest.mark.parametrize("size", [5, 1024])
def test_pairs_in_any_order_and_repeated(retriever: Retriever, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "PAIRS_PER_BATCH", size)
    pairs = np.array([(3, 7), (0, 14), (3, 2), (11, 0), (3, 7), (1, 14), (2, 7)])
    assert relative_error(retriever.score_pairs(*SOME, pairs), SCORES[tuple(pairs.T)]) < 1e-4
    assert retriever.score_pairs(*SOME, []).shape == (0,)
    assert retriever.score([], SOME[1]).shape == (0, 15)


def test_a_caption_is_its_word_pieces(retriever: Retriever) -> None:
    record = Text("7", np.array(retriever.tokenizer.encode(CAPTION)), "", {})
    scores = retriever.score([CAPTION, record, CAPTION + "s"], SOME[1][:3])
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert (np.abs(scores[2] - scores[0]) > 1e-4).all()


def test_ranking_reads_the_database_once_in_blocks(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    names = IMAGES.names()
    scores = retriever.score([CAPTION, "two men"], [IMAGES[name] for name in names])
    monkeypatch.setattr(module, "IMAGES_PER_BLOCK", 16)
    look_up, read, in_memory, alive = ImageDatabase.__getitem__, [], [], weakref.WeakValueDictionary[str, Image]()

    def watched(self: ImageDatabase, name: str) -> Image:
        image = alive[name] = look_up(self, name)
        read.append(name)
        in_memory.append(len(alive))
        return image

    monkeypatch.setattr(ImageDatabase, "__getitem__", watched)
    both = retriever.rank_each([CAPTION, "two men"], IMAGES)
    assert read == names
    assert max(in_memory) == 16
    for ranked, row in zip(both, scores, strict=True):
        assert [name for name, _ in ranked] == [names[index] for index in np.argsort(-row)]
        np.testing.assert_allclose([score for _, score in ranked], -np.sort(-row), rtol=1e-5, atol=1e-6)
    assert retriever.rank(CAPTION, IMAGES, top=3) == retriever.rank(CAPTION, IMAGES)[:3]
    assert len(retriever.rank(CAPTION, IMAGES, top=100)) == 40
    assert not any("forward" in vars(layer) for layer in retriever.model.modules())  # nothing stays prepacked
    assert Ranked("a", -1.5).sigmoid == pytest.approx(1 / (1 + np.exp(1.5)))
    assert (Ranked("a", 5000).sigmoid, Ranked("a", -5000).sigmoid) == (1, 0)


def test_equal_scores_keep_the_order_of_the_database() -> None:
    same = Retriever.from_checkpoint(*MODEL, device="cpu")
    torch.nn.init.zeros_(same.model.rank_output.weight)
    assert [name for name, _ in same.rank(CAPTION, IMAGES, 25)] == IMAGES.names()[:25]


def test_attention_is_that_of_the_naive_twin(retriever: Retriever) -> None:
    text = TEXTS[TEXTS.ids[int(TEXTS.lengths.argmin())]]
    image = IMAGES[text.image]
    image = replace(image, features=image.features[:4], boxes=image.boxes[:4])
    weights = {name: tensor.double() for name, tensor in BUNDLED.model().state_dict().items()}
    tokens = [TEXTS.cls_id, *text.input_ids.tolist(), TEXTS.sep_id]
    score, maps = naive.forward(weights, naive.Pair(tokens, image.features, image.boxes), 4, 3)
    attention = retriever.attention(text, image)
    assert attention.score == pytest.approx(float(score), rel=1e-4)
    assert attention.image is image
    assert retriever.tokenizer.decode(text.input_ids) == " ".join(attention.pieces).replace(" ##", "")
    assert list(attention.maps) == [0, 1, 2]
    for layer, scores in attention.maps.items():
        assert (scores.dtype, scores.requires_grad) == (torch.float32, False)
        assert relative_error(scores, torch.stack(maps[layer])) < 1e-4
    for blocks, of_maps in ((attention.blocks(layer=1, head=2), maps[1][2:3]), (attention.blocks(), maps[2])):
        for name, expected in naive.blocks(of_maps, len(tokens)).items():
            torch.testing.assert_close(getattr(blocks, name).exp().double(), expected, rtol=1e-3, atol=1e-5)

    part = retriever.attention(text, image, layers=[1, 0])
    assert sorted(part.maps) == [0, 1]
    assert torch.equal(part.maps[1], attention.maps[1])
    assert torch.equal(part.blocks().VL, attention.blocks(layer=1).VL)
    for given in ({"layer": 2}, {"layer": 1.0}, {"head": -1}, {"head": 4}, {"head": True}):
        with pytest.raises(InputError, match=f"{next(iter(given))} is .*, expected "):
            part.blocks(**given)


RIGHT: dict[str, dict[str, Any]] = {
    "rank": {"text": CAPTION, "image_db": IMAGES}, "rank_each": {"texts": [CAPTION], "image_db": IMAGES},
    "score": {"texts": [CAPTION], "images": [IMAGE]}, "score_pairs": {"texts": [CAPTION], "images": [IMAGE], "pairs": [(0, 0)]},
    "attention": {"text": CAPTION, "image": IMAGE}, "from_checkpoint": {"checkpoint": MODEL[0], "model_config": MODEL[1]},
}  # fmt: skip
WRONG: dict[str, Sequence[Any]] = {
    "text": (5, None, ["a"], b"a", Text("9", np.array([1.5]), "", {})), "texts": ("a dog", 5, None, ["a", 5]),
    "image_db": (None, "db"), "image": ("a.npz", [IMAGE]),
    "images": (IMAGE, IMAGES, ["a.npz"], [replace(IMAGE, boxes=IMAGE.boxes[:2])]),
    "top": (0, 1.5, "3", True, float("nan")), "pairs": (None, [0, 0], [(0, 0.5)], [(0, 1)], [(-1, 0)], "00"),
    "layers": (1, [], [1.0], [3], [-1], "0"), "checkpoint": (None, 5), "model_config": ({},), "vocab": (5, 0),
    "device": (5, "x"), "precision": ("fp8", 16), "batch_size": (0, 1.5, "400"), "train_config": (0, []),
}  # fmt: skip


@pytest.mark.parametrize("method", RIGHT)
def test_arguments_of_another_kind(retriever: Retriever, method: str) -> None:
    function = getattr(retriever, method)
    for name, values in WRONG.items():
        for wrong in values if name in inspect.signature(function).parameters else ():
            with pytest.raises(InputError, match=f"{name.removesuffix('s')}s? .*, expected ") as caught:
                function(**RIGHT[method] | {name: wrong})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (" \t\n", "has no word pieces"),
        ("a\udce9", "text 'a\\\\udce9' is not Unicode"),
        ("dog " * 127, r"text 'dog dog .*…' has 127 word pieces, expected at most 126"),
        (Text("9", np.empty(0, np.int64), "", {}), "text '9' has no word pieces"),
        (Text("9", np.array([5, -1]), "", {}), "text '9' has word-piece id -1"),
        (Text("9", np.array([5, 28996]), "", {}), "text '9' has word-piece id 28996, the vocabulary bert-base-cased has 28996"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_scored(retriever: Retriever, caption: str | Text, message: str) -> None:
    for use in (
        lambda: retriever.score([CAPTION, caption], [IMAGE]),
        lambda: retriever.rank(caption, IMAGES),
        lambda: retriever.attention(caption, IMAGE),
    ):
        with pytest.raises(InputError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_images_and_databases_that_cannot_be_scored(retriever: Retriever, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"image 'heldout_.*npz' has features of width 32"):
        retriever.score([CAPTION], [replace(IMAGE, features=IMAGE.features[:, :32])])

    shutil.copytree(BUNDLED.image_db, tmp_path / "db")
    folder, name = next((tmp_path / "db").glob("*/data.mdb")).parent, IMAGES.names()[30]
    with lmdb.open(str(folder), map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        transaction.put(name.encode(), bytes(transaction.get(name.encode())[:100]))
    with pytest.raises(InputError, match=f"image '{name}': "):
        retriever.rank(CAPTION, ImageDatabase(tmp_path / "db"))
    with lmdb.open(str(tmp_path / "feat_numbb36")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"__keys__", b"[]")
    with pytest.raises(InputError, match="empty image database"):
        retriever.rank(CAPTION, ImageDatabase(tmp_path, BoxRule(-1)))


def test_checkpoints_and_vocabularies_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.load(MODEL[0], weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if "_output" not in name}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt: holds neither rank_output nor itm_output"):
        Retriever.from_checkpoint(tmp_path / "m.pt", MODEL[1])
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
    (tmp_path / "short.txt").write_text("\n".join(pieces))
    (tmp_path / "long.txt").write_text("\n".join([*pieces, *map(str, range(29_000))]))
    with pytest.raises(InputError, match=r"long\.txt: has 29007 word pieces"):
        Retriever.from_checkpoint(*MODEL, vocab=tmp_path / "long.txt")
    padded = Retriever.from_checkpoint(*MODEL, vocab=tmp_path / "short.txt", device="cpu")
    assert "short.txt: has 7 word pieces, the model 28996" in caplog.text
    assert padded.tokenizer.encode("a dog") == [5, 6]
    with pytest.raises(InputError, match=r"\.db: CLS is 101, in vocabulary short\.txt it is 2"):
        padded.check_vocabulary(TextDatabase(BUNDLED.text_db))
    (tmp_path / "log").mkdir()
    (tmp_path / "log/vocabulary.json").write_text('{"vocab_sha256": "of another", "toker": "the same"}')
    with pytest.raises(InputError, match=r"bert-base-cased: vocab_sha256 is 'eeaa.*, in .*vocabulary\.json it is 'of another'"):
        Retriever.from_checkpoint(tmp_path / "ckpt/model_best.pt", MODEL[1])
    with pytest.raises(InputError, match=r"in .*log/vocabulary\.json it is 'of another'"):
        Retriever.from_checkpoint(*MODEL, train_config=tmp_path / "log/hps.json")
    with pytest.raises(InputError, match="c: CLS is 2, in b it is 1; expected the same vocabulary"):
        check_vocabularies({"a": {"SEP": 3}, "b": {"CLS": 1}, "c": {"CLS": 2, "SEP": 3}})
    check_vocabularies({"a": {"toker": "x", "vocab_sha256": "1"}, "b": {"toker": "y", "vocab_sha256": "1"}})
    with pytest.raises(InputError, match="b: vocab_sha256 is '2', in a it is '1'"):
        check_vocabularies({"a": {"vocab_sha256": "1"}, "b": {"toker": "x", "vocab_sha256": "2"}})


def test_the_documented_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL))
    for written, here in (
        ("iais/model_best.pt", MODEL[0]),
        ("config/uniter-base.json", MODEL[1]),
        ("img_db/flickr30k", BUNDLED.image_db),
        ("txt_db/itm_flickr30k_test.db", BUNDLED.text_db),
    ):
        assert code.count(f'"{written}"') == 1
        code = code.replace(written, str(here))
    found: dict[str, Any] = {}
    exec(compile(code, "docs/api.md", "exec"), found)
    assert (found["scores"].shape, found["scores"].dtype) == ((2, 3), np.float32)
    np.testing.assert_allclose(found["chosen"], found["scores"][[0, 1], [2, 0]], rtol=1e-5)
    assert found["raw"].shape[0] == 4
    assert len(capsys.readouterr().out.splitlines()) == 5 + len(found["attention"].pieces)

"""The report of evaluations: its contents and, in a real browser, how it opens, reads, and answers the keyboard."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image as Picture

import inf_itm
from data.image_db import ImageDatabase
from data.text_db import Text, TextDatabase, TextDatabaseWriter
from evaluation.recall import UNRANKED, Ranks, ranks, recalls
from evaluation.report.charts import count_ranks
from evaluation.report.page import write_report
from evaluation.report.queries import Captions, best_answers, displayable
from evaluation.report.runs import COLUMNS, compare, read_runs, run_names
from evaluation.retriever import Retriever
from scripts import report
from tests.browser import Opened, browser
from tests.conftest import BUNDLED
from tests.test_programs import fails, inference
from utils.files import save_json, save_npz

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

Visit = Callable[..., Opened]
PER_IMAGE = 5
HOSTILE = [
    "<script>hacked = 1</script>",
    "</script><script>hacked = 1</script><!--",
    '"><img src=x onerror="hacked = 1">',
    "' onfocus='hacked=1' autofocus tabindex='1",
    "{{ 7 * 7 }} {% raw %} & &amp; &lt;b&gt;",
    "قطة سوداء تجلس على الكرسي",
    "👩‍🚀 two lines\u2028of emoji 🏳️‍🌈",
    "NoSpaces" * 60,
]
HOSTILE_IMAGE = '<img src=x onerror="hacked=1">.npz'


def save_run(folder: Path, text_db: Path, scores: np.ndarray, **changes: Any) -> Path:
    """Write an output folder of ``inf_itm.py`` whose checkpoint is gone, with ``changes`` to ``scores.json``."""
    database = TextDatabase(text_db)
    folder.mkdir(parents=True)
    ids = {"txt_ids": np.array(list(database.ids)), "img_ids": np.array(list(database.images))}
    save_npz(folder / "scores.npz", scores=scores, **ids)
    gone = {"txt_db": str(text_db), "img_db": "gone", "checkpoint": "gone.pt", "model_config": "gone.json", "output_dir": "x"}
    provenance = {"options": gone, "checkpoint_sha256": "0" * 64, "precision": "fp32", "device": "cpu", "commit": None}
    save_json(folder / "scores.json", recalls(ranks(scores, database.image_of)) | {"provenance": provenance} | changes)
    return folder


def make_texts(path: Path, images: int) -> Path:
    meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, 28996]}
    with TextDatabaseWriter(path, meta) as writer:
        for number in range(PER_IMAGE * images):
            image = HOSTILE_IMAGE if number < PER_IMAGE else f"photo_{number // PER_IMAGE}.npz"
            writer.put(
                str(number), [1000 + number % 9000], image, raw=dict(enumerate(HOSTILE)).get(number, f"caption {number}")
            )
    return path


def two_runs(folder: Path, images: int) -> list[Path]:
    """Write two runs with ``PER_IMAGE`` texts per image: the hostile captions are the hardest, the second run is better."""
    text_db = make_texts(folder / "texts.db", images)
    own = np.arange(PER_IMAGE * images), np.arange(PER_IMAGE * images) // PER_IMAGE
    folders = []
    for name, lift in (("plain <b>", 1.5), ("singular", 4.0)):
        scores = np.random.default_rng(0).normal(size=(PER_IMAGE * images, images)).astype(np.float32)
        scores[own] += lift
        scores[own[0][: len(HOSTILE)], own[1][: len(HOSTILE)]] = -9 - np.arange(len(HOSTILE))[::-1]
        folders.append(save_run(folder / name / "test", text_db, scores))
    return folders


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two small runs with hostile captions and names."""
    folder = tmp_path_factory.mktemp("hostile")
    write_report(two_runs(folder, 12), folder / "report", queries=len(HOSTILE))
    return folder / "report/index.html"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an evaluation of the golden model, ../run, with pictures of all images but two: one absent, one broken."""
    folder = tmp_path_factory.mktemp("golden")
    run, output, pictures = folder / "run", folder / "report", folder / "pictures"
    inf_itm.main(inference(BUNDLED.text_db, BUNDLED.image_db, run))
    pictures.mkdir()
    for number, name in enumerate(TextDatabase(BUNDLED.text_db).images):
        if number:
            Picture.new("RGB", (640, 480), (5 * number, 120, 90)).save(pictures / name.replace(".npz", ".png"))
        if number == 3:
            (pictures / name.replace(".npz", ".png")).write_bytes(b"broken")
    report.main([str(run), "--output", str(output), "--images", str(pictures), "--queries", "12"])
    return output / "index.html"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def visit(context: BrowserContext) -> Iterator[Visit]:
    """Open a page; after the test, check that it reported no errors and requested nothing from outside its folder."""
    opened: list[Opened] = []

    def visit(file: Path, **settings: Any) -> Opened:
        opened.append(Opened(context, file, **settings))
        return opened[-1]

    yield visit
    for page in opened:
        assert page.errors == []
        assert all(url.startswith("file:") for url in page.requests), page.requests
        page.page.close()


def test_a_large_report_opens_at_once_and_holds_the_right_numbers(visit: Visit, tmp_path: Path) -> None:
    runs = two_runs(tmp_path, 1000)
    started = time.process_time()
    write_report(runs, tmp_path / "report")
    assert time.process_time() - started < 5
    opened = visit(tmp_path / "report/index.html")
    opened.page.locator("#hard-img [role=listbox]").press("ArrowDown")
    assert opened.page.locator("#panel-img-1").is_visible()
    assert 0.01 < opened.busy() < 2
    saved = [json.loads((folder / "scores.json").read_text()) for folder in runs]
    expected = [f"{100 * of_run[key]:.2f}" for of_run in saved for key in COLUMNS]
    assert opened.page.locator("table.recalls tbody .value").all_inner_texts() == expected
    assert sum(path.stat().st_size for path in (tmp_path / "report").rglob("*") if path.is_file()) < 2e6


def test_hostile_captions_are_text(visit: Visit, hostile: Path) -> None:
    opened = visit(hostile)
    page = opened.page
    options = page.locator("#hard-img [role=option] bdi")
    assert options.all_text_contents() == HOSTILE
    for number, caption in enumerate(HOSTILE):
        options.nth(number).click()
        assert page.locator(f"#panel-img-{number} h3").text_content() == caption
        page.locator(f"#panel-img-{number} .answer.right").first.click()
        assert page.locator("#overlay h2").text_content() == caption
        page.keyboard.press("Escape")
    assert HOSTILE_IMAGE in page.locator("#panel-img-0 .answer.right").first.inner_text()
    assert "plain <b>/test" in page.locator("#recall tbody").inner_text()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.title() == "texts.db: plain <b>/test, singular/test"
    assert opened.errors == []
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"hacked = 1\">')")
    page.wait_for_function("() => document.body.lastElementChild.complete")
    assert page.evaluate("typeof hacked") == "undefined"  # even markup that got in would not run
    assert any("Content Security Policy" in error for error in opened.errors)
    opened.errors.clear()


def test_the_keyboard_reaches_everything(visit: Visit, small: Path) -> None:
    page = visit(small).page

    def focused(expression: str) -> Any:
        return page.evaluate(f"(e => {expression})(document.activeElement)")

    stops = []
    while (not stops or stops[-1] != "BODY.") and len(stops) < 60:
        page.keyboard.press("Tab")
        stops.append(focused("e.tagName + '.' + e.className"))
        assert focused("getComputedStyle(e).outlineStyle") == "solid" or stops[-1] == "BODY."
    assert stops[0] == "A."
    assert stops.count("UL.queries") == 2
    assert sum(stop.startswith("BUTTON.answer") for stop in stops) == page.locator(".answer:visible").count() > 10
    assert page.evaluate("document.querySelectorAll('[tabindex]').values().every(e => e.tabIndex <= 0)")

    queries = page.locator("#hard-txt [role=listbox]")
    queries.focus()
    for key, number in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 11), ("ArrowDown", 11), ("Home", 0)):
        page.keyboard.press(key)
        assert queries.get_attribute("aria-activedescendant") == f"option-txt-{number}"
        assert page.locator("#hard-txt [aria-selected=true]").get_attribute("id") == f"option-txt-{number}"
        assert page.locator("#hard-txt article:visible").get_attribute("id") == f"panel-txt-{number}"
    page.keyboard.press("Tab")
    opener = focused("e.dataset.pair + e.dataset.query")
    for close in (lambda: page.keyboard.press("Escape"), page.locator("#overlay .close").click):
        page.keyboard.press("Enter")
        assert page.locator("#overlay").is_visible()
        assert focused("e.textContent") == "all words"
        page.keyboard.press("ArrowRight")
        assert focused("e.getAttribute('aria-pressed')") == "true"
        close()
        assert not page.locator("#overlay").is_visible()
        assert focused("e.dataset.pair + e.dataset.query") == opener


def test_the_page_and_its_overlay_show_what_the_model_computes(visit: Visit, small: Path) -> None:
    page, golden_run = visit(small).page, small.parent.with_name("run")
    expected = json.loads((golden_run / "scores.json").read_text())["analysis"]["interval_95"]
    for key in COLUMNS:
        low, high = expected[key]
        assert f"[{100 * low:.2f} – {100 * high:.2f}]" in page.locator(f"table.recalls td[data-key={key}]").inner_text()
    page.locator("#panel-img-0 img").first.scroll_into_view_if_needed()
    loaded = "() => [...document.querySelectorAll('#panel-img-0 img')].every(i => i.complete && i.naturalWidth == 400)"
    page.wait_for_function(loaded)
    ((found, shown),) = re.findall(r"(\d+) of the (\d+) images", page.locator("#origin").inner_text())
    assert 0 <= int(shown) - int(found) <= 2
    assert page.locator(".blank .name", has_text=TextDatabase(BUNDLED.text_db).images[3]).count()
    for kind, mark in (("right", "✓"), ("wrong", "✗")):
        marks = page.locator(f"#panel-img-0 .{kind} .mark").all_inner_texts()
        assert {mark in text and kind in text for text in marks} == {True}

    retriever = Retriever.from_checkpoint(BUNDLED.folder / "model.pt", BUNDLED.folder / "model.json", device="cpu")
    text_db, image_db = TextDatabase(BUNDLED.text_db), ImageDatabase(BUNDLED.image_db)
    _, (run,) = read_runs([golden_run])
    hardest = int(run.ranks["img"].argmax())
    text = text_db[text_db.ids[hardest]]
    attention = retriever.attention(text, image_db[text.image])
    weights = attention.blocks().LV.exp().numpy()

    right = page.locator("#panel-img-0 .answer.right")
    assert f"#{int(run.ranks['img'][hardest]) + 1}" in right.inner_text()
    assert f"{attention.score:.2f}".replace("-", "−") in right.inner_text()
    right.click()
    words = page.locator("#overlay .words button")
    assert words.all_text_contents() == ["all words", *attention.pieces]
    word = int(np.diff(np.sort(weights, axis=1))[:, -1].argmax())  # its two best regions are farthest apart
    words.nth(word + 1).hover()
    best = int(weights[word].argmax())
    told = page.locator("#overlay .told").inner_text()
    assert told.startswith(f"“{attention.pieces[word]}” attends most to region {best} ({100 * weights[word, best]:.1f}\u202f%)")
    regions = page.locator("#overlay .region")
    assert regions.count() == weights.shape[1]
    assert float(regions.nth(best).evaluate("box => box.style.getPropertyValue('--weight')")) == 1
    x1, y1, x2, y2 = attention.image.boxes[best, :4]
    corner = [float(regions.nth(best).get_attribute(name) or "nan") for name in ("x", "y", "width", "height")]
    width, height = map(float, (page.locator("#overlay svg").get_attribute("viewBox") or "").split()[2:])
    np.testing.assert_allclose(corner, [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height], atol=0.5)


@pytest.mark.parametrize("page", ["small", "hostile"])
def test_a_narrow_window_is_legible_in_light_and_dark(visit: Visit, page: str, request: pytest.FixtureRequest) -> None:
    grounds = []
    for dark in (False, True):
        opened = visit(request.getfixturevalue(page), width=360, height=640, dark=dark)
        grounds.append(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
        assert ("◆" in opened.page.locator("#recall tbody").inner_text()) == (page == "hostile")
        measured = opened.contrasts()
        opened.page.locator(".answer.right:visible").first.click()
        measured += opened.contrasts()
        assert len(measured) > 100
        assert not [entry for entry in measured if entry[0] < (3 if entry[1] else 4.5)]
        left, right = opened.page.evaluate("[overlay.getBoundingClientRect().left, overlay.getBoundingClientRect().right]")
        assert 0 <= left < right <= 360 == opened.page.evaluate("document.documentElement.scrollWidth")
        assert opened.page.evaluate("overlay.scrollWidth <= overlay.clientWidth")
    assert grounds == ["rgb(251, 251, 250)", "rgb(20, 22, 26)"]


def test_a_checkpoint_that_has_changed_is_not_used(visit: Visit, small: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small.parent.with_name("run"), tmp_path / "run"))
    saved = json.loads((run / "scores.json").read_text())
    saved["provenance"]["checkpoint_sha256"] = "0" * 64
    save_json(run / "scores.json", saved)
    write_report([run], tmp_path / "report", queries=1)
    page = visit(tmp_path / "report/index.html").page
    assert "model.pt has changed since" in page.locator("#origin").inner_text()
    page.locator(".answer:visible").first.click()
    assert "There is no attention to show" in page.locator("#overlay").inner_text()
    assert not page.locator("#overlay .words").is_visible()
    assert page.evaluate("document.activeElement.className") == "close"


def test_runs_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.random.default_rng(1).normal(size=(25, 5)).astype(np.float32)
    few = scores[:20, :4]
    one, two, shuffled = (make_texts(tmp_path / f"{name}.db", images) for name, images in (("1", 4), ("2", 5), ("3", 4)))
    a, c, e, f = (save_run(tmp_path / name, db, few) for name, db in zip("acef", (one, shuffled, one, one), strict=True))
    b, d = save_run(tmp_path / "b", two, scores), save_run(tmp_path / "d", one, few, img_r1=0.123)
    ids = {"txt_ids": np.array([*map(str, range(18)), "19", "18"]), "img_ids": np.array(list(TextDatabase(one).images))}
    save_npz(c / "scores.npz", scores=few, **ids)
    save_npz(e / "scores.npz", scores=np.full_like(few, np.nan), **ids)
    (f / "scores.json").write_text("{}")
    for folders, message in (
        ((a, b), f"b/scores.npz: has 25 texts, {a} has 20; expected the same"),
        ((a, c), f"c/scores.npz: txt_ids[18] is '19', in {a} '18'; expected the same texts in the same order"),
        ((c,), f"c/scores.npz: txt_ids[18] is '19', in {shuffled} '18'"),
        ((d,), "d/scores.json: img_r1 is 0.123, scores.npz and"),
        ((e,), "e/scores.npz: scores has NaN or infinity"),
        ((f,), "f/scores.json: Object missing required field `provenance`; expected the scores.json of inf_itm.py"),
        ((tmp_path / "g",), "g/scores.json: no such file"),
        ((a, tmp_path / "b/../a"), "given twice"),
    ):
        assert message in fails(capsys, report.main, [*map(str, folders), "--output", str(tmp_path / "new/report")])
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").write_text("text")
    assert "mine: already exists" in fails(capsys, report.main, [str(a), "--output", str(tmp_path / "mine")])
    assert (tmp_path / "mine").read_text() == "text"


def test_run_names() -> None:
    assert run_names([Path("/runs/plain/test")]) == ["test"]
    assert run_names([Path("/a/plain/test"), Path("/a/singular/test")]) == ["plain/test", "singular/test"]
    assert run_names([Path("/a/x/test"), Path("/b/x/test"), Path("/b/y/val")]) == ["a/x/test", "b/x/test", "b/y/val"]


def test_best_answers_agree_with_ranks() -> None:
    rng = np.random.default_rng(2)
    image_of = np.arange(12) // 3
    for _ in range(50):
        scores = rng.integers(0, 6, size=(12, 4)).astype(np.float32)  # many ties
        scores[rng.random(scores.shape) < 0.1] = -np.inf
        expected = ranks(scores, image_of)
        queries = [(scores[:, image], image_of == image, expected.txt[image]) for image in range(4)]
        queries += [(scores[text], np.arange(4) == image_of[text], expected.img[text]) for text in range(12)]
        for of_query, positives, rank in queries:
            answers = best_answers(of_query, positives)
            assert next((answer.rank - 1 for answer in answers if answer.right), UNRANKED) == rank
            best = sorted(of_query[of_query > -np.inf].tolist(), reverse=True)[:5]
            assert [(answer.rank, answer.score) for answer in answers[:5]] == list(enumerate(best, start=1))
            assert all(of_query[answer.candidate] == answer.score for answer in answers)


def test_comparison_and_rank_counts() -> None:
    rng = np.random.default_rng(3)
    image_of = np.arange(1000) // 5
    founds = [Ranks(rng.geometric(p, 200) - 1, rng.geometric(p, 1000) - 1, {}) for p in (0.3, 0.3, 0.6)]
    founds[2].img[7] = UNRANKED
    runs: list[Any] = [SimpleNamespace(recalls=recalls(f), intervals={}, ranks={"img": f.img, "txt": f.txt}) for f in founds]
    first, same, better = compare(runs, image_of)
    assert all(cell.difference is None and not cell.best for cell in first.values())
    for key in COLUMNS:
        assert better[key].difference == runs[2].recalls[key] - runs[0].recalls[key]
        low, high = better[key].difference_interval or (np.nan, np.nan)
        assert low <= (better[key].difference or 0) <= high
    assert (better["r_mean"].best, better["r_mean"].differs) == (True, True)
    assert sum(cell.differs for cell in same.values()) <= 2
    labels, counts, queries = count_ranks(runs, "img")
    assert (*labels[:3], labels[-1]) == ("1", "2–5", "6–10", "none")
    assert [sum(row) for row in counts] == [queries] * 3 == [1000] * 3
    assert [sum(row[:2]) / 1000 for row in counts] == [run.recalls["img_r5"] for run in runs]
    assert [row[-1] for row in counts] == [0, 0, 1]


def test_captions_without_a_sentence_are_decoded() -> None:
    captions = Captions(TextDatabase(BUNDLED.text_db))
    ids = np.array([138, 4843, 8581])
    assert captions.of(Text("1", ids, "x", {"raw": "A dog"})) == "A dog"
    assert captions.of(Text("1", ids, "x", {"raw": " ", "sentence": "The dog"})) == "The dog"
    decoded = captions.of(Text("1", ids, "x", {"raw": ["no text"]}))
    assert re.fullmatch(r"A \w+ ?\w+", decoded)
    assert displayable("half \ud83d") == "half ?"

"""The report of evaluations: what is in it, and in a real browser how it opens, reads, and answers to the keyboard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image as Picture

from data.image_db import ImageDatabase
from data.picture_names import find_pictures
from data.text_db import Text, TextDatabase, TextDatabaseWriter
from evaluation.analysis import analyse
from evaluation.options import InferenceOptions
from evaluation.recall import UNRANKED, Ranks, ranks, recalls
from evaluation.report.build import write_report
from evaluation.report.captions import Captions, displayable
from evaluation.report.charts import count_ranks
from evaluation.report.comparison import COLUMNS, compare
from evaluation.report.queries import best_answers
from evaluation.report.runs import Provenance, Run, read_runs, run_names
from evaluation.retriever import Retriever
from scripts import report
from tests.browser import Opened, browser
from tests.conftest import BUNDLED
from tests.test_programs import fails
from utils.errors import InputError
from utils.files import save_json, save_npz, sha256

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

PER_IMAGE = 5
MODEL = {"checkpoint": "model.pt", "model_config": "model.json"}
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
    """An output folder as ``inf_itm.py`` leaves it, of a checkpoint that is gone; ``changes`` are to ``scores.json``."""
    database = TextDatabase(text_db)
    folder.mkdir(parents=True)
    ids = {"txt_ids": np.array(list(database.ids)), "img_ids": np.array(list(database.images))}
    save_npz(folder / "scores.npz", scores=scores, **ids)
    gone = {"txt_db": str(text_db), "img_db": "gone", "checkpoint": "gone.pt", "model_config": "gone.json", "output_dir": "x"}
    provenance = {"options": gone, "checkpoint_sha256": "0" * 64, "precision": "fp32", "device": "cpu", "commit": None}
    found = ranks(scores, database.image_of)
    save_json(folder / "scores.json", recalls(found) | {"provenance": provenance} | changes)
    return folder


def make_texts(path: Path, images: int, captions: Callable[[int], str] = "caption {}".format) -> Path:
    meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": [106, 28996]}
    with TextDatabaseWriter(path, meta) as writer:
        for number in range(PER_IMAGE * images):
            image = HOSTILE_IMAGE if number < PER_IMAGE else f"photo_{number // PER_IMAGE}.npz"
            writer.put(str(number), [1000 + number % 9000], image, raw=captions(number))
    return path


def two_runs(folder: Path, images: int) -> list[Path]:
    """Runs of as many images with ``PER_IMAGE`` texts each: the hostile captions are the hardest, the second run is better."""
    text_db = make_texts(folder / "texts.db", images, lambda n: HOSTILE[n] if n < len(HOSTILE) else f"caption {n}")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(PER_IMAGE * images, images)).astype(np.float32)
    own = np.arange(len(scores)), np.arange(len(scores)) // PER_IMAGE
    folders = []
    for name, lift in (("plain <b>", 1.5), ("singular", 4.0)):
        lifted = scores.copy()
        lifted[own] += lift
        lifted[own[0][: len(HOSTILE)], own[1][: len(HOSTILE)]] = -9 - np.arange(len(HOSTILE))[::-1]
        folders.append(save_run(folder / name / "test", text_db, lifted))
    return folders


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about two small runs, with hostile captions and names."""
    folder = tmp_path_factory.mktemp("hostile")
    write_report(two_runs(folder, 12), folder / "report", queries=len(HOSTILE))
    return folder / "report/index.html"


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's scores, its checkpoint being where they say, and analysed."""
    text_db = TextDatabase(BUNDLED.text_db)
    rows, columns = (BUNDLED.arrays[f"eval/{kind}"].tolist() for kind in ("txt_ids", "img_ids"))
    places = np.ix_([rows.index(name) for name in text_db.ids], [columns.index(name) for name in text_db.images])
    scores = BUNDLED.arrays["eval/scores"][places].astype(np.float32)
    files = {"img_db": str(BUNDLED.image_db), **{key: str(BUNDLED.folder / name) for key, name in MODEL.items()}}
    options = {"txt_db": str(BUNDLED.text_db), "output_dir": "x", **files}
    provenance = {"options": options, "checkpoint_sha256": sha256(files["checkpoint"]), "precision": "fp32", "device": "cpu"}
    analysed = analyse(ranks(scores, text_db.image_of), text_db.image_of, text_db.lengths, np.full(len(columns), 36))
    folder = tmp_path_factory.mktemp("golden") / "evaluated"
    return save_run(folder, BUNDLED.text_db, scores, provenance=provenance, analysis=analysed)


@pytest.fixture(scope="module")
def small(golden_run: Path) -> Path:
    """The page about ``golden_run``, with pictures of all images but one."""
    pictures = golden_run.parent / "pictures"
    pictures.mkdir()
    for number, name in enumerate(TextDatabase(BUNDLED.text_db).images):
        if number:
            Picture.new("RGB", (640, 480), (5 * number, 120, 90)).save(pictures / name.replace(".npz", ".png"))
    output = golden_run.parent / "report"
    report.main([str(golden_run), "--output", str(output), "--images", str(pictures), "--queries", "12"])
    return output / "index.html"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def clean(opened: Opened) -> None:
    """The page said nothing of errors and asked for nothing from outside its folder; closes it."""
    assert opened.errors == []
    assert all(url.startswith("file:") for url in opened.requests), opened.requests
    opened.page.close()


def test_a_large_report_opens_at_once_and_holds_the_right_numbers(context: BrowserContext, tmp_path: Path) -> None:
    runs = two_runs(tmp_path, 1000)
    started = time.process_time()
    write_report(runs, tmp_path / "report")
    assert time.process_time() - started < 5
    large = tmp_path / "report/index.html"
    opened = Opened(context, large)
    opened.page.locator("#hard-img [role=listbox]").press("ArrowDown")
    assert opened.page.locator("#panel-img-1").is_visible()
    assert 0.01 < opened.busy() < 2
    for row, folder in enumerate(runs):
        expected = json.loads((folder / "scores.json").read_text())
        for key in COLUMNS:
            cell = opened.page.locator(f"table.recalls tbody tr:nth-child({row + 1}) td[data-key={key}] .value")
            assert cell.inner_text() == f"{100 * expected[key]:.2f}"
    assert sum(path.stat().st_size for path in large.parent.rglob("*") if path.is_file()) < 2e6
    clean(opened)


def test_hostile_captions_are_text(context: BrowserContext, hostile: Path) -> None:
    opened = Opened(context, hostile)
    page = opened.page
    options = page.locator("#hard-img [role=option] bdi")
    assert [options.nth(number).text_content() for number in range(len(HOSTILE))] == HOSTILE
    for number in range(len(HOSTILE)):
        options.nth(number).click()
        assert page.locator(f"#panel-img-{number} h3").text_content() == HOSTILE[number]
        page.locator(f"#panel-img-{number} .answer.right").first.click()
        assert page.locator("#overlay h2").text_content() == HOSTILE[number]
        page.keyboard.press("Escape")
    assert HOSTILE_IMAGE in page.locator("#panel-img-0 .answer.right").first.inner_text()
    assert "plain <b>/test" in page.locator("#recall tbody").inner_text()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.title() == "texts.db: plain <b>/test, singular/test"
    clean(opened)


def test_even_markup_that_got_in_would_not_run(context: BrowserContext, hostile: Path) -> None:
    opened = Opened(context, hostile)
    opened.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"hacked = 1\">')")
    opened.page.wait_for_function("() => document.body.lastElementChild.complete")
    assert opened.page.evaluate("typeof hacked") == "undefined"
    assert any("Content Security Policy" in error for error in opened.errors)
    opened.page.close()


def test_the_keyboard_goes_everywhere(context: BrowserContext, small: Path) -> None:
    opened = Opened(context, small)
    page = opened.page

    def focused(expression: str) -> Any:
        return page.evaluate(f"document.activeElement.{expression}")

    stops = []
    while (not stops or stops[-1] != "BODY.") and len(stops) < 60:
        page.keyboard.press("Tab")
        name = focused("tagName + '.' + document.activeElement.className")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or name == "BODY."
        stops.append(name)
    assert stops[0] == "A."
    assert stops.count("UL.queries") == 2
    shown = page.locator(".answer:visible").count()
    assert sum(stop.startswith("BUTTON.answer") for stop in stops) == shown > 10
    assert page.evaluate("document.querySelectorAll('[tabindex]').values().every(e => e.tabIndex <= 0)")

    queries = page.locator("#hard-txt [role=listbox]")
    queries.focus()
    for key, number in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 11), ("ArrowDown", 11), ("Home", 0)):
        page.keyboard.press(key)
        assert queries.get_attribute("aria-activedescendant") == f"option-txt-{number}"
        assert page.locator("#hard-txt [aria-selected=true]").get_attribute("id") == f"option-txt-{number}"
        assert page.locator("#hard-txt article:visible").get_attribute("id") == f"panel-txt-{number}"
    page.keyboard.press("Tab")
    opener = focused("dataset.pair + document.activeElement.dataset.query")
    page.keyboard.press("Enter")
    assert page.locator("#overlay").is_visible()
    assert focused("textContent") == "all words"
    page.keyboard.press("ArrowRight")
    assert focused("getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Escape")
    assert not page.locator("#overlay").is_visible()
    assert focused("dataset.pair + document.activeElement.dataset.query") == opener
    page.keyboard.press("Enter")
    page.locator("#overlay .close").click()
    assert focused("dataset.pair + document.activeElement.dataset.query") == opener
    clean(opened)


def test_the_overlay_shows_what_the_model_attends_to(context: BrowserContext, small: Path, golden_run: Path) -> None:
    opened = Opened(context, small)
    page = opened.page
    retriever = Retriever.from_checkpoint(*(BUNDLED.folder / name for name in MODEL.values()), device="cpu")
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
    two_best = np.sort(weights, axis=1)[:, -2:]
    word = int((two_best[:, 1] - two_best[:, 0]).argmax())
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
    page.keyboard.press("Escape")
    clean(opened)


def test_intervals_are_shown_where_there_are_some(context: BrowserContext, small: Path, golden_run: Path) -> None:
    opened = Opened(context, small)
    expected = json.loads((golden_run / "scores.json").read_text())["analysis"]["interval_95"]
    for key in COLUMNS:
        low, high = expected[key]
        cell = opened.page.locator(f"table.recalls td[data-key={key}]").inner_text()
        assert f"[{100 * low:.2f} – {100 * high:.2f}]" in cell
    clean(opened)


def test_thumbnails_are_shown_and_one_is_missing(context: BrowserContext, small: Path) -> None:
    opened = Opened(context, small)
    loaded = "() => [...document.querySelectorAll('#panel-img-0 img')].every(i => i.complete && i.naturalWidth == 400)"
    opened.page.locator("#panel-img-0 img").first.scroll_into_view_if_needed()
    opened.page.wait_for_function(loaded)
    note = re.search(r"(\d+) of the (\d+) images", opened.page.locator("#origin").inner_text())
    assert note is not None
    assert 0 <= int(note[2]) - int(note[1]) <= 1
    clean(opened)


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgb = (colour) => { if (!known.has(colour)) { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1); known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]); } return known.get(colour); };
  const luminance = (colour) => { const [r, g, b] = rgb(colour).slice(0, 3).map((value) => value / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (element) => { for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor; if (rgb(colour)[3] === 255) return colour; } return "white"; };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const bar = element.matches(".bar, .swatch");
    if (!(texts || bar) || !element.checkVisibility() || element.matches("script, style, title, .tag")) continue;
    const style = getComputedStyle(element);
    const swatch = element.matches(".swatch");
    const colour = swatch ? style.backgroundColor : element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [luminance(colour), luminance(ground(swatch ? element.parentElement : element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, bar, element.className.baseVal ?? element.className, element.textContent.slice(0, 30)]);
  }
  return found;
}"""


def test_light_and_dark_are_both_legible(context: BrowserContext, small: Path, hostile: Path) -> None:
    grounds = []
    for file, dark in ((small, False), (small, True), (hostile, False), (hostile, True)):
        opened = Opened(context, file, dark=dark)
        grounds.append(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        measured = opened.page.evaluate(CONTRASTS)
        opened.page.locator(".answer:visible").first.click()
        measured += opened.page.evaluate(CONTRASTS)
        assert len(measured) > 100
        assert not [entry for entry in measured if entry[0] < (3 if entry[1] else 4.5)]
        clean(opened)
    assert grounds[0] == grounds[2] != grounds[1] == grounds[3]


def test_right_and_wrong_are_told_without_colours(context: BrowserContext, small: Path) -> None:
    opened = Opened(context, small)
    for kind, mark in (("right", "✓"), ("wrong", "✗")):
        marks = opened.page.locator(f"#panel-img-0 .{kind} .mark").all_inner_texts()
        assert marks
        assert all(mark in text and kind in text for text in marks)
    clean(opened)


def test_a_narrow_window_does_not_scroll_sideways(context: BrowserContext, small: Path, hostile: Path) -> None:
    for file in (small, hostile):
        opened = Opened(context, file, width=360, height=640)
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert ("◆" in page.locator("#recall tbody").inner_text()) == (file == hostile)
        page.locator(".answer.right:visible").first.click()
        box = page.locator("#overlay").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("overlay.scrollWidth <= overlay.clientWidth")
        clean(opened)


def test_a_checkpoint_that_has_changed_is_not_used(context: BrowserContext, golden_run: Path, tmp_path: Path) -> None:
    saved = json.loads((golden_run / "scores.json").read_text())
    saved["provenance"]["checkpoint_sha256"] = "0" * 64
    (tmp_path / "run").mkdir()
    (tmp_path / "run/scores.npz").symlink_to(golden_run / "scores.npz")
    save_json(tmp_path / "run/scores.json", saved)
    write_report([tmp_path / "run"], tmp_path / "report", queries=1)
    opened = Opened(context, tmp_path / "report/index.html")
    assert "model.pt has changed since" in opened.page.locator("#origin").inner_text()
    opened.page.locator(".answer:visible").first.click()
    assert "There is no attention to show" in opened.page.locator("#overlay").inner_text()
    assert not opened.page.locator("#overlay .words").is_visible()
    assert opened.page.evaluate("document.activeElement.className") == "close"
    clean(opened)


def test_runs_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    one, two = (make_texts(tmp_path / f"{name}.db", images) for name, images in (("one", 4), ("two", 5)))
    scores = rng.normal(size=(25, 5)).astype(np.float32)
    a, b = save_run(tmp_path / "a", one, scores[:20, :4]), save_run(tmp_path / "b", two, scores)
    shuffled = make_texts(tmp_path / "shuffled.db", 4)
    ids = {"txt_ids": np.array([*map(str, range(18)), "19", "18"]), "img_ids": np.array(list(TextDatabase(one).images))}
    c = save_run(tmp_path / "c", shuffled, scores[:20, :4])
    save_npz(c / "scores.npz", scores=scores[:20, :4], **ids)
    d = save_run(tmp_path / "d", one, scores[:20, :4], img_r1=0.123)
    e = save_run(tmp_path / "e", one, scores[:20, :4])
    save_npz(e / "scores.npz", scores=np.full((20, 4), np.nan, np.float32), **(ids | {"txt_ids": np.arange(20).astype(str)}))
    (tmp_path / "f").mkdir()

    def line(*folders: Path) -> str:
        return fails(capsys, report.main, [*map(str, folders), "--output", str(tmp_path / "new/report")])

    assert f"b/scores.npz: has 25 texts, {a} has 20; expected the same" in line(a, b)
    assert f"c/scores.npz: txt_ids[18] is '19', in {a} '18'; expected the same texts in the same order" in line(a, c)
    assert f"c/scores.npz: txt_ids[18] is '19', in {shuffled} '18'" in line(c)
    assert "d/scores.json: img_r1 is 0.123, scores.npz and" in line(d)
    assert "e/scores.npz: scores has NaN or infinity" in line(e)
    assert "f/scores.json: no such file" in line(tmp_path / "f")
    assert "given twice" in line(a, tmp_path / "b/../a")
    (a / "scores.json").write_text("{}")
    assert "a/scores.json: Object missing required field `provenance`; expected the scores.json of inf_itm.py" in line(a)
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_kept(golden_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("text")
    assert "mine: already exists" in fails(capsys, report.main, [str(golden_run), "--output", str(tmp_path / "mine")])
    assert (tmp_path / "mine").read_text() == "text"


def test_run_names() -> None:
    assert run_names([Path("/runs/plain/test")]) == ["test"]
    assert run_names([Path("/a/plain/test"), Path("/a/singular/test")]) == ["plain/test", "singular/test"]
    assert run_names([Path("/a/x/test"), Path("/b/x/test"), Path("/b/y/val")]) == ["a/x/test", "b/x/test", "b/y/val"]


def test_best_answers_agree_with_ranks() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        scores = rng.integers(0, 6, size=(12, 4)).astype(np.float32)  # many ties
        scores[rng.random(scores.shape) < 0.1] = -np.inf
        image_of = np.arange(12) // 3
        found = ranks(scores, image_of)
        for place in range(4):
            answers = best_answers(scores[:, place], image_of == place)
            check_answers(answers, scores[:, place], int(found.txt[place]))
        for place in range(12):
            answers = best_answers(scores[place], np.arange(4) == image_of[place])
            check_answers(answers, scores[place], int(found.img[place]))


def check_answers(answers: list[Any], scores: np.ndarray, rank: int) -> None:
    first_right = next((answer.rank - 1 for answer in answers if answer.right), UNRANKED)
    assert first_right == rank
    assert [answer.rank for answer in answers[:5]] == list(range(1, len(answers[:5]) + 1)) or rank >= 5
    shown = [answer.score for answer in answers[:5]]
    assert shown == sorted(scores[scores > -np.inf].tolist(), reverse=True)[: len(shown)]
    assert all(scores[answer.place] == answer.score for answer in answers)


def run_of(found: Ranks, name: str) -> Run:
    options = InferenceOptions(txt_db="x", img_db="x", checkpoint="x", model_config="x", output_dir="x")
    provenance = Provenance(options, "", "fp32", "cpu")
    return Run(name, Path(name), recalls(found), {}, provenance, 0, {"img": found.img, "txt": found.txt}, {})


def test_comparison_and_rank_counts() -> None:
    rng = np.random.default_rng(3)
    image_of = np.arange(1000) // 5
    founds = [Ranks(rng.geometric(p, 200) - 1, rng.geometric(p, 1000) - 1, {}) for p in (0.3, 0.3, 0.6)]
    founds[2].img[7] = UNRANKED
    runs = [run_of(found, str(number)) for number, found in enumerate(founds)]
    first, same, better = compare(runs, image_of)
    assert all(cell.difference is None and not cell.best for cell in first.values())
    for key in COLUMNS:
        assert better[key].difference == runs[2].recalls[key] - runs[0].recalls[key]
        low, high = better[key].difference_interval or (np.nan, np.nan)
        assert low <= (better[key].difference or 0) <= high
    assert better["r_mean"].best
    assert better["r_mean"].differs
    assert sum(cell.differs for cell in same.values()) <= 2
    counted = count_ranks(runs, "img")
    assert [sum(row) for row in counted.counts] == [1000] * 3
    assert counted.labels[:3] == ["1", "2–5", "6–10"]
    assert counted.labels[-1] == "none"
    for row, run in zip(counted.counts, runs, strict=True):
        assert sum(row[:2]) / 1000 == run.recalls["img_r5"]
    assert [row[-1] for row in counted.counts] == [0, 0, 1]


def test_pictures_are_found_by_the_names_of_their_features(tmp_path: Path) -> None:
    files = ["1000092795.jpg", "val2014/COCO_val2014_000000000042.jpg", "own/dog.PNG", "own/dog.txt", "cat.jpeg"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = {"flickr30k_001000092795.npz", "coco_val2014_000000000042.npz", "dog.npz", "bird.npz"}
    found = find_pictures(tmp_path, names)
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == {
        "flickr30k_001000092795.npz": files[0],
        "coco_val2014_000000000042.npz": files[1],
        "dog.npz": files[2],
    }
    with pytest.raises(InputError, match=r"has a picture of none of 1 images, expected one for 'fox\.npz'"):
        find_pictures(tmp_path, {"fox.npz"})
    (tmp_path / "dog.jpg").touch()
    with pytest.raises(InputError, match=r"both would be image 'dog\.npz'"):
        find_pictures(tmp_path, names)


def test_captions_without_a_sentence_are_decoded() -> None:
    captions = Captions(TextDatabase(BUNDLED.text_db))
    ids = np.array([138, 4843, 8581])
    assert captions.of(Text("1", ids, "x", {"raw": "A dog"})) == "A dog"
    assert captions.of(Text("1", ids, "x", {"raw": " ", "sentence": "The dog"})) == "The dog"
    decoded = captions.of(Text("1", ids, "x", {"raw": ["no text"]}))
    assert re.fullmatch(r"A \w+ ?\w+", decoded)
    assert displayable("half \ud83d") == "half ?"

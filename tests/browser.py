"""A headless Chromium to open pages in. Tests that need one are skipped if there is none; IAIS_BROWSER names another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")]


def browser_program() -> str:
    """Return the path of a browser; skip the test if there is none."""
    named = [os.environ["IAIS_BROWSER"]] if "IAIS_BROWSER" in os.environ else _PROGRAMS
    found = next(filter(None, map(shutil.which, named)), None)
    if found is None:
        pytest.skip(f"no browser among {', '.join(named)}; IAIS_BROWSER can name one")
    return found


_CONTRASTS = """() => {
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


@contextmanager
def browser(profile: Path) -> Iterator[BrowserContext]:
    """Run a browser with a new ``profile`` folder; skip the test if playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=browser_program(), headless=True, args=_FLAGS
        )
        context.set_default_timeout(120_000)  # milliseconds; the machine may be busy
        yield context
        context.close()


class Opened:
    """A page in a new tab, with the errors that it reported and the URLs that it requested."""

    def __init__(self, context: BrowserContext, file: Path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self._session = context.new_cdp_session(self.page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.page.goto(file.absolute().as_uri())

    def busy(self) -> float:
        """Return the CPU seconds of the page's main thread so far, which do not depend on the load of the machine."""
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")

    def contrasts(self) -> list[tuple[float, bool, str, str]]:
        """Return for each visible text, bar and swatch its contrast, whether it is no text, its class and its text."""
        return [tuple(entry) for entry in self.page.evaluate(_CONTRASTS)]

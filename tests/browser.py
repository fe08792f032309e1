"""A headless Chromium to open pages in; what needs one is skipped where there is none. IAIS_BROWSER names another."""

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
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browser_program() -> str:
    """The path of a browser; skips the test where there is none."""
    named = [os.environ["IAIS_BROWSER"]] if "IAIS_BROWSER" in os.environ else _PROGRAMS
    found = next(filter(None, map(shutil.which, named)), None)
    if found is None:
        pytest.skip(f"no browser among {', '.join(named)}; IAIS_BROWSER can name one")
    return found


@contextmanager
def browser(profile: Path) -> Iterator[BrowserContext]:
    """A browser with a new ``profile`` folder; skips the test without the package playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=browser_program(), headless=True, args=list(_FLAGS)
        )
        context.set_default_timeout(120_000)  # milliseconds; a busy machine is no fault of a page
        yield context
        context.close()


class Opened:
    """A page in a tab of its own, and all that it said and asked for."""

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
        """Seconds that the page's main thread has computed so far, which do not depend on what else the machine does."""
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")

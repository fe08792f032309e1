"""Install pip into the virtual environment whose interpreter runs this, with nothing but the standard library.

For a Python without ``ensurepip``, such as Debian's ``python3`` where the package ``python3-venv`` is missing. The version is
the one that ``constraints.txt`` names; the wheel comes from the package index in ``PIP_INDEX_URL`` (PyPI when unset) and must
have the SHA-256 that the index states.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urldefrag, urljoin
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.errors import InputError, one_line_errors  # noqa: E402

TIMEOUT = 60  # seconds without an answer


class LinkCollector(HTMLParser):
    """Keeps the targets of a page's links in ``hrefs``."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.hrefs.append(href)


def pinned_version(constraints: Path) -> str:
    """The version in the line ``pip==<version>`` of a constraints file."""
    match = re.search(r"^pip==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise InputError(f"{constraints}: no line 'pip==<version>'")
    return match[1]


def fetch(url: str) -> tuple[str, bytes]:
    """Return the address that ``url`` led to and what lies there; ``InputError`` when it cannot be read."""
    # Indexes may answer in JSON by default; all of them know HTML (PEP 503).
    headers = {"Accept": "application/vnd.pypi.simple.v1+html, text/html;q=0.9, */*;q=0.1"}
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
            return response.url, response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: cannot fetch pip ({error}); installing the package python3-venv avoids this step") from error


def find_wheel(index: str, filename: str) -> tuple[str, str]:
    """Return the address and the stated SHA-256 (hexadecimal) of a wheel of pip; ``InputError`` when the index lacks it."""
    page_url, page = fetch(f"{index.rstrip('/')}/pip/")
    links = LinkCollector()
    links.feed(page.decode("utf-8"))
    for href in links.hrefs:
        url, fragment = urldefrag(urljoin(page_url, href))
        if url.endswith(f"/{filename}") and fragment.startswith("sha256="):
            return url, fragment.removeprefix("sha256=")
    raise InputError(f"{page_url}: no {filename} with a sha256")


@one_line_errors
def main() -> None:
    filename = f"pip-{pinned_version(ROOT / 'constraints.txt')}-py3-none-any.whl"
    url, sha256 = find_wheel(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple", filename)
    content = fetch(url)[1]
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{url}: its sha256 is not {sha256}, which the index states")
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / filename
        wheel.write_bytes(content)
        # A wheel is a zip archive, from which Python can run the pip inside.
        subprocess.run([sys.executable, str(wheel / "pip"), "install", "--quiet", "--no-index", str(wheel)], check=True)


if __name__ == "__main__":
    main()

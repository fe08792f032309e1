"""A web server that misbehaves on request."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

WEAK = 'W/"1"'


class Fault(NamedTuple):
    """What the server does wrong in response to one request."""

    status: int = 0
    sent: int | None = None  # bytes after which it closes the connection
    stalls: bool = False  # instead of closing it
    headers: dict[str, str | None] = {}  # noqa: RUF012  (None: absent)
    ranges: bool = True


class Site(ThreadingHTTPServer):
    """Serves ``files`` below /uniter; each GET uses up one of the ``faults`` of its path. A context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/uniter"
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.always = Fault()
        self.knows_head = True
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.released = threading.Event()  # ends stalls
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def ranges(self, path: str) -> list[str | None]:
        return [asked for method, name, asked in self.requests if (method, name) == ("GET", path)]

    def requested(self) -> set[str]:
        """Return the paths of all requests so far, and forget them."""
        names = {name for _, name, _ in self.requests}
        self.requests.clear()
        return names

    def handle_error(self, *_: object) -> None:
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(self.server.always if self.server.knows_head else Fault(405))

    def do_GET(self) -> None:
        faults = self.server.faults[self._name]
        self._answer(faults.popleft() if faults else self.server.always)

    @property
    def _name(self) -> str:
        return self.path.split("/uniter/", 1)[-1]  # a proxy is asked for the whole URL

    def _answer(self, fault: Fault) -> None:
        asked = self.headers["Range"]
        self.server.requests.append((self.command, self._name, asked))
        contents = self.server.files.get(self._name)
        status, body = fault.status or (404 if contents is None else 200), b""
        headers: dict[str, str | None] = {}
        if contents is not None and status == 200:
            body = contents
            headers = {"ETag": f'"{hashlib.md5(contents).hexdigest()}"', "Last-Modified": "Sun, 01 Sep 2019 12:00:00 GMT"}
            headers |= fault.headers
            if asked and fault.ranges and self.headers["If-Range"] in {headers["ETag"], headers["Last-Modified"]} - {WEAK}:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                status, body = 206, contents[start:]
                headers["Content-Range"] = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers | fault.headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.wfile.write(body[: fault.sent])
            self.wfile.flush()
            if fault.stalls:
                self.server.released.wait(20)

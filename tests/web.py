"""A web server that misbehaves on request."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


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
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.released = threading.Event()  # ends stalls
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def ranges(self, path: str) -> list[str | None]:
        return [asked for method, name, asked in self.requests if (method, name) == ("GET", path)]

    def handle_error(self, *_: object) -> None:
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, asked = self.path.split("/uniter/", 1)[-1], self.headers["Range"]  # a proxy is asked for the whole URL
        self.server.requests.append((self.command, path, asked))
        faults = self.server.faults[path] if self.command == "GET" else None
        fault = faults.popleft() if faults else self.server.always
        contents = self.server.files.get(path)
        status, body = fault.status or (404 if contents is None else 200), b""
        headers: dict[str, str | None] = {}
        if contents is not None and status == 200:
            body = contents
            headers["ETag"] = f'"{hashlib.md5(contents).hexdigest()}"'
            headers |= self.server.always.headers
            if asked and fault.ranges and self.headers["If-Range"] in (headers["ETag"], headers.get("Last-Modified")):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                status, body = 206, contents[start:]
                headers["Content-Range"] = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers | fault.headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: fault.sent])
            if fault.stalls:
                self.server.released.wait(20)

"""An HTTP server of a folder, for tests: ranges, ETags, counted bytes, failures on demand."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store:
    """What the server does, and what it did.

    Attributes:
        folder: what is served.
        url: of the folder.
        ranges, sizes: whether it answers ranges, and tells sizes.
        fail: what happens to a GET of this path: "500", "cut" (half of it), or None.
        seconds: how long a GET takes.
        gets: the path and range of each GET.
        nbytes: bytes of the bodies sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.ranges = self.sizes = True
        self.fail: Callable[[str], str | None] = lambda path: None
        self.seconds = 0.0
        self.gets: list[tuple[str, str]] = []
        self.nbytes = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: Store, *rest: object) -> None:
        self.store = store
        super().__init__(*rest)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        with self.store.lock:
            self.store.gets.append((self.path, self.headers.get("Range", "")))
        time.sleep(self.store.seconds)
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        store, path = self.store, self.store.folder / self.path.lstrip("/")
        fail = store.fail(self.path) if body else None
        data = path.read_bytes() if path.is_file() else None
        etag = f'"{hashlib.md5(data or b"").hexdigest()}"'
        if fail == "500":
            self._say(500, b"the disk is on fire", body)
        elif data is None:
            self._say(404, b"", body)
        elif self.headers.get("If-Match", etag) != etag:
            self._say(412, b"", body)
        else:
            self._send(data, body, {"ETag": etag}, fail == "cut")

    def _send(self, data: bytes, body: bool, headers: dict[str, str], cut: bool) -> None:
        status, whole = 200, len(data)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and self.store.ranges:
            start, end = asked.groups()
            first = int(start) if start else whole - int(end)
            last = min(int(end) + 1, whole) if start and end else whole
            data, status = data[first:last], 206
            headers |= {"Content-Range": f"bytes {first}-{last - 1}/{whole}", "Accept-Ranges": "bytes"}
        self._say(status, data, body, headers, cut)

    def _say(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.store.sizes:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.close_connection = True
        self.end_headers()
        if body:
            data = data[: len(data) // 2] if cut else data
            with self.store.lock:
                self.store.nbytes += len(data)
            self.wfile.write(data)
            self.close_connection = self.close_connection or cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left."""


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    store = Store(folder)
    with _Server(("127.0.0.1", 0), partial(_Handler, store)) as server:
        store.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()

"""A small HTTP server of files, as publishers and the hub have it, that also answers as servers do on a bad day."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

HUB = re.compile(r"/datasets/[\w.-]+/[\w.-]+/resolve/[0-9a-f]{40}/.+")
"""Paths for which the hub sends its client on to another server."""


@dataclass(frozen=True)
class Asked:
    """A request: its path, where it wants the file to begin, and what became of it."""

    path: str
    start: int
    outcome: str


class DownloadServer:
    """Serves `files`, by path, until the block ends; `script` says what becomes of the first requests for files.

    An outcome is "well", a status ("404", "500"), "break" (the connection ends after half of what is left), "changed"
    (other bytes), "longer" (more bytes), "slow" (in many small pieces), "stall" (half, and nothing more until `let_go`
    or the block's end), "whole" (all of the file, whatever part is asked for), or "unsized" (no Content-Length).
    `then` is that of all further requests. Files on the hub's paths are had by a redirect, as there; the redirect is no
    request for a file.
    """

    def __init__(self, files: dict[str, bytes], script: Sequence[str] = (), then: str = "well") -> None:
        self.files = files
        self.log: list[Asked] = []
        self.redirected: list[str] = []
        self.then = then
        self._script = list(script)
        self._lock = Lock()
        self._ended = Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "DownloadServer":
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def outcomes(self) -> list[str]:
        """Return what became of the requests for files, in the order of their arrival."""
        return [asked.outcome for asked in list(self.log)]

    def let_go(self) -> None:
        """End the connections that stall."""
        self._ended.set()

    def wait(self, num: int, outcome: str) -> None:
        """Wait until so many requests had an outcome."""
        end = time.monotonic() + 300
        while self.outcomes().count(outcome) < num:
            assert time.monotonic() < end, self.log
            time.sleep(0.01)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if HUB.fullmatch(self.path):
                    server.redirected.append(self.path)
                    self.send_response(302)
                    self.send_header("Location", f"/cdn{self.path}?signature=1")
                    self.send_header("X-Repo-Commit", self.path.split("/")[5])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                path = self.path.removeprefix("/cdn").partition("?")[0]
                found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
                start = int(found[1]) if found else 0
                with server._lock:
                    outcome = server._script.pop(0) if server._script else server.then
                    outcome = outcome if path in server.files else "404"
                    server.log.append(Asked(path, start, outcome))
                _send(self, server, path, start, outcome)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _send(handler: BaseHTTPRequestHandler, server: DownloadServer, path: str, start: int, outcome: str) -> None:
    """Answer with a file, or the part of it that is asked for."""
    if outcome.isdigit():
        handler.send_response(int(outcome))
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    whole = server.files[path]
    if outcome == "changed":
        whole = whole[:-1] + bytes([whole[-1] ^ 1])
    if outcome == "longer":
        whole += whole
    if outcome == "whole":
        start = 0
    if start >= len(whole) > 0:
        handler.send_response(416)
        handler.end_headers()
        return
    part = whole[start:]
    handler.send_response(206 if start else 200)
    handler.send_header("ETag", f'"{sha256(whole).hexdigest()}"')
    if outcome != "unsized":
        handler.send_header("Content-Length", str(len(part)))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
    handler.end_headers()
    if handler.command == "HEAD":
        return
    if outcome == "slow":
        for begin in range(0, len(part), max(1, len(part) // 20)):
            handler.wfile.write(part[begin : begin + max(1, len(part) // 20)])
            handler.wfile.flush()
            time.sleep(0.02)
        return
    handler.wfile.write(part[: len(part) // 2] if outcome in ("break", "stall") else part)
    handler.wfile.flush()
    if outcome == "stall":
        server._ended.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no error of the server."""

"""A proxy in front of an S3 server that has S3's bad days, a network's and a cache's, by a seed.

What it answers is what such a server may answer: a condition that fails (412) is never made up. It counts requests and
bytes, and refuses what its policy forbids (support/s3_policy.py).
"""

import http.client
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

from support.servers import signed_by

ERRORS = {
    "409": (409, "ConditionalRequestConflict", "A conflicting conditional operation is in progress."),
    "429": (429, "TooManyRequests", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
}
BEFORE = ("latency", "409", "429", "500", "503", "dropped before", "dropped midway", "stale")
"""What happens to a request before the server sees it, or in its place; 409 only to one with a condition."""
AFTER = ("dropped after", "500 after", "truncated", "slow")
"""What happens to an answer, of a request that the server has carried out; the last two to what is read."""
KINDS = (*BEFORE, *AFTER)
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length")


@dataclass(frozen=True)
class Request:
    """What a client asks: `path` is the bucket and the key, `principal` the access key of its signature."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    principal: str

    @property
    def is_conditional(self) -> bool:
        """Whether it writes only under a condition."""
        return self.method in ("PUT", "POST") and ("if-none-match" in self.headers or "if-match" in self.headers)

    @property
    def is_read(self) -> bool:
        """Whether it reads."""
        return self.method in ("GET", "HEAD")


@dataclass(frozen=True)
class Answer:
    """What the server says."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True)
class Handled:
    """A request that was handled: bytes up and down, the status (0: no answer) and the faults."""

    method: str
    path: str
    query: Mapping[str, str]
    principal: str
    status: int
    num_up: int
    num_down: int
    faults: tuple[str, ...]
    seconds: float


@dataclass
class Faults:
    """How often each kind of KINDS happens, by chance; `limit` is how many happen at all."""

    rates: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    latency: float = 0.0
    """Seconds that every request waits."""
    limit: int | None = None
    stale_seconds: float = 1.0
    """How old what a cache answers may be."""

    def __post_init__(self) -> None:
        assert set(self.rates) <= set(KINDS), self.rates
        self._random = random.Random(self.seed)
        self._lock = Lock()
        self.counts: Counter[str] = Counter()

    def draw(self, request: Request, kinds: Sequence[str]) -> str | None:
        """Return the fault that a request meets, if any."""
        with self._lock:
            if self.limit is not None and self.counts.total() >= self.limit:
                return None
            chance = self._random.random()
            for kind in kinds:
                if chance < (rate := self.rates.get(kind, 0.0)):
                    return kind if self._fits(kind, request) else None
                chance -= rate
        return None

    def _fits(self, kind: str, request: Request) -> bool:
        if kind == "409":
            return request.is_conditional
        if kind in ("truncated", "slow", "stale"):
            return request.is_read
        return kind != "dropped midway" or int(request.headers.get("content-length", 0)) > 1

    def happened(self, kind: str) -> None:
        """Count a fault."""
        with self._lock:
            self.counts[kind] += 1


Guard = Callable[[Request, Callable[[str, str], bool]], str | None]
"""Returns why a request is forbidden; it may ask whether an object is there, by bucket and key."""


class FaultProxy:
    """Serves in front of `target`, a URL, until the block ends; `stop` and `start` are the server's death and return.

    `strips` names request headers that are dropped: without if-none-match it is a store that ignores conditions.
    """

    def __init__(
        self, target: str, faults: Faults | None = None, guard: Guard | None = None, strips: Sequence[str] = ()
    ) -> None:
        self.log: list[Handled] = []
        self.faults = faults or Faults()
        self.guard = guard
        self._strips = {name.lower() for name in strips}
        self._target = urlsplit(target).netloc
        self._cache: dict[tuple[str, str, str], tuple[float, Answer]] = {}
        self._lock, self._dying = Lock(), Lock()
        self._server = self._listening(0)
        self.is_up = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die, if it lives: who connects is refused, and connections that stand are reset."""
        with self._dying:
            if self.is_up:
                self._server.shutdown()
                self._server.server_close()
                self._server.reset_connections()
                self.is_up = False

    def start(self) -> None:
        """Come back, if it is dead, on the same port."""
        with self._dying:
            if not self.is_up:
                self._server = self._listening(self.port)
                self.is_up = True

    def forget(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self.log.clear()

    def count(self, method: str | None = None) -> int:
        """Return the number of requests, or of those of a method."""
        return sum(method in (None, handled.method) for handled in list(self.log))

    def num_bytes(self) -> tuple[int, int]:
        """Return the bytes of bodies, up and down."""
        log = list(self.log)
        return sum(handled.num_up for handled in log), sum(handled.num_down for handled in log)

    def _listening(self, port: int) -> "_Server":
        server = _Server(("127.0.0.1", port), _handler(self))
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    # --- called by the handler

    def remember(self, handled: Handled) -> None:
        with self._lock:
            self.log.append(handled)

    def cached(self, request: Request, target: str) -> Answer | None:
        """Return what the server said to the same question a while ago."""
        with self._lock:
            then, answer = self._cache.get(_question(request, target), (0.0, None))
        return answer if time.monotonic() - then < self.faults.stale_seconds else None

    def keep(self, request: Request, target: str, answer: Answer) -> None:
        """Keep an answer as a cache does, until it is too old; what is kept is not replaced before."""
        if not request.is_read or answer.status not in (200, 206, 404) or "stale" not in self.faults.rates:
            return
        with self._lock:
            then, _ = self._cache.get(_question(request, target), (0.0, None))
            if time.monotonic() - then >= self.faults.stale_seconds:
                self._cache[_question(request, target)] = (time.monotonic(), answer)

    def forward(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Ask the server itself."""
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            kept = {name: value for name, value in headers.items() if name.lower() not in self._strips}
            kept |= {"content-length": str(len(body))} if body or method in ("PUT", "POST") else {}
            connection.request(method, target, body=body or None, headers=kept)
            answer = connection.getresponse()
            contents = answer.read()
            length = answer.getheader("content-length") if method == "HEAD" else None
            found = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
            found += [("Content-Length", length if length is not None else str(len(contents)))]
            return Answer(answer.status, tuple(found), contents)
        finally:
            connection.close()

    def has(self, bucket: str, key: str) -> bool:
        """Return whether an object is there."""
        signed = {"authorization": signed_by("AKIAPROXY")}
        return self.forward("HEAD", f"/{bucket}/{key}", signed, b"").status == 200


def _question(request: Request, target: str) -> tuple[str, str, str]:
    """Return what a cache tells answers apart by."""
    return request.method, target, request.headers.get("range", "")


def error_answer(status: int, code: str, message: str) -> Answer:
    """Return an error as S3 words it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    headers = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
    return Answer(status, headers, body.encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request, client_address) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def reset_connections(self) -> None:
        """Reset what is connected."""
        for connection in list(self._open):
            reset(connection)

    def handle_error(self, *_) -> None:
        """Say nothing of clients that leave."""


def reset(connection: socket.socket) -> None:
    """End a connection as a server does that dies: with a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass


class _Dropped(Exception):
    """The connection ends without an answer."""


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_) -> None:
            """Say nothing."""

        def _handle(self) -> None:
            began = time.monotonic()
            faults: list[str] = []
            status, request = 0, None
            answer = error_answer(*ERRORS["500"])
            try:
                request = self._head()
                fault = proxy.faults.draw(request, BEFORE)
                request = replace(request, body=self._body(request, half=fault == "dropped midway"))
                answer = self._answer(request, fault, faults)
                status = answer.status
                self._send(request, answer, faults)
            except (_Dropped, ConnectionError, TimeoutError):
                status = 0
                self.close_connection = True
                reset(self.connection)
            finally:
                for kind in faults:
                    proxy.faults.happened(kind)
                if request is not None:
                    up, down = len(request.body), len(answer.body) * (request.method != "HEAD" and status > 0)
                    seconds = time.monotonic() - began
                    proxy.remember(
                        Handled(
                            request.method, request.path, request.query, request.principal,
                            status, up, down, tuple(faults), seconds,
                        )
                    )  # fmt: skip

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

        def _head(self) -> Request:
            headers = {name.lower(): value for name, value in self.headers.items()}
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            principal = headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]
            return Request(self.command, unquote(url.path), query, headers, b"", principal)

        def _body(self, request: Request, half: bool) -> bytes:
            if "chunked" in request.headers.get("transfer-encoding", ""):
                return self._chunks()
            return self.rfile.read(int(request.headers.get("content-length", 0)) // (2 if half else 1))

        def _chunks(self) -> bytes:
            found = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(found)

        def _answer(self, request: Request, fault: str | None, faults: list[str]) -> Answer:
            time.sleep(proxy.faults.latency)
            if fault == "stale":
                if (known := proxy.cached(request, self.path)) is not None:
                    faults.append(fault)
                    return known
            elif fault is not None:
                faults.append(fault)
                if fault in ERRORS:
                    return error_answer(*ERRORS[fault])
                if fault.startswith("dropped"):
                    raise _Dropped
                time.sleep(0.3)
            if proxy.guard is not None and (reason := proxy.guard(request, proxy.has)) is not None:
                return error_answer(403, "AccessDenied", reason)
            passed = {name: value for name, value in request.headers.items() if name not in ("expect", *_HOP_BY_HOP)}
            answer = proxy.forward(self.command, self.path, passed, request.body)
            proxy.keep(request, self.path, answer)
            return answer

        def _send(self, request: Request, answer: Answer, faults: list[str]) -> None:
            fault = None if faults or answer.status >= 500 else proxy.faults.draw(request, AFTER)
            if fault in ("truncated", "slow") and len(answer.body) < 2:
                fault = None
            faults.extend([fault] if fault else [])
            if fault == "dropped after":
                raise _Dropped
            if fault == "500 after":
                answer = error_answer(*ERRORS["500"])
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            if request.method == "HEAD":
                return
            if fault == "truncated":
                self.wfile.write(answer.body[: len(answer.body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            pieces = 8 if fault == "slow" else 1
            size = -(-len(answer.body) // pieces) or 1
            for start in range(0, len(answer.body), size):
                self.wfile.write(answer.body[start : start + size])
                self.wfile.flush()
                time.sleep(0.05 * (fault == "slow"))

    return Handler

"""An S3 server as a process: moto's, whose requests are taken one at a time, as S3 takes those of one name.

moto looks whether a name is free and writes in two steps; two threads between them would both be told that they won.
The process ends when its stdin does, which is when whoever started it has died.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable
from threading import Lock, Thread
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """A WSGI application that reads a request whole before it is the next one's turn."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = Lock()

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        """Answer a request."""
        if length := environment.get("CONTENT_LENGTH"):
            environment["wsgi.input"] = io.BytesIO(environment["wsgi.input"].read(int(length)))
        with self._lock:
            answer = self._application(environment, start)
            try:
                return list(answer)
            finally:
                getattr(answer, "close", lambda: None)()


class _Handler(MotoRequestHandler):
    def log(self, *_: object) -> None:
        """Say nothing."""


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve on a free port, and print it."""
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Handler)
    print(server.server_port, flush=True)
    Thread(target=_end_with_stdin, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()

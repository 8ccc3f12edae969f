"""HTTP of an endpoint that may be hostile: replies of bounded size and time, and no way to another place.

No reply is unpacked, so none is a bomb: none is asked for packed, and a packed one is refused. A redirect is followed
within one scheme, host and port; what leads elsewhere is returned as it is, and nothing is sent there.
"""

import base64
import re
import sys
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

if TYPE_CHECKING:
    import openai

MOST_BYTES = 16 * 2**20
"""Of one reply: a hundred times what a model writes."""
_MOST_REDIRECTS = 3
_WINDOW = 8
"""So many of a key's characters in a row are a part of it."""
T = TypeVar("T")


class UnboundedError(Exception):
    """A reply that is packed, or larger than any answer."""


def bounded_client(timeout: float, connect: float) -> "openai.DefaultHttpxClient":
    """Return an HTTP client whose calls end after `timeout` seconds in all, however slowly a server sends.

    It raises errors of the HTTP library that the openai package is built on, which asks again after them.
    """
    import openai

    class Bounded(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            del stream  # a reply is read whole
            library = sys.modules[type(request).__module__.partition(".")[0]]  # httpx, or a successor of it
            deadline = time.monotonic() + timeout
            try:
                return _within(timeout, lambda: self._read(request, options, deadline))
            except TimeoutError as error:
                raise library.ReadTimeout("it sends too slowly", request=request) from error
            except UnboundedError as error:
                raise library.ReadError(str(error), request=request) from error

        def _read(self, request: Any, options: dict[str, Any], deadline: float) -> Any:
            for left in reversed(range(_MOST_REDIRECTS + 1)):
                response = super().send(request, **{**options, "stream": True, "follow_redirects": False})
                following = response.next_request
                if not left or following is None or _place(following.url) != _place(request.url):
                    break
                response.close()
                request = following
            try:
                body = _body(response, deadline)
            finally:
                response.close()
            known = {"headers": response.headers, "extensions": response.extensions, "request": request}
            return type(response)(response.status_code, content=body, **known)

    limits = openai.Timeout(timeout, connect=connect)
    return Bounded(timeout=limits, headers={"Accept-Encoding": "identity"})


def _place(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _body(response: Any, deadline: float) -> bytes:
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("", "identity"):
        raise UnboundedError(f"its reply is packed ({packing[:20]}), which was not asked for")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MOST_BYTES:
            raise UnboundedError(f"its reply is larger than {MOST_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, or raise what it raises; raise TimeoutError where it takes longer.

    The thread is a daemon, which ends with the connection.
    """
    done: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # raised again below, where a caller can meet it
            done.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # there is no error, so it is the call's


def without_key(text: str, key: str) -> str:
    """Return a text of a server's; none of it where it holds the key, or a part of it, in a form that tells it."""
    found = _letters(text)
    raw = key.encode()
    forms = (
        key,
        key[::-1],
        quote(key, safe=""),
        raw.hex(),
        base64.b64encode(raw).decode(),
        base64.b32encode(raw).decode(),
    )
    for form in map(_letters, forms):
        size = min(_WINDOW, len(form))
        if any(form[start : start + size] in found for start in range(len(form) - size + 1)):
            return "(its words hold the key, and are not shown)"
    return text


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())

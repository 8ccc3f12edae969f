"""What a judge or a model behind an endpoint cannot do: fill memory, hold a call for ever, get a key sent elsewhere."""

import base64
import gzip
import json
import socket
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

import pytest

from fedcli.errors import RequirementError
from fedcli.eval import bounded_http
from fedcli.eval.bounded_http import without_key
from fedcli.eval.endpoint import Endpoint
from fedcli.eval.requests import Generation
from fedcli.tasks.conversation import Turn

KEY = "sk-Geheim/0123456789+abcdef"
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "well"}, "finish_reason": "stop"}
WELL = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [CHOICE]}).encode()


@contextmanager
def serving(answer: Callable[[socket.socket], object]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the URL of a server that answers each request by a function of its connection, and what it was sent."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += connection.recv(2**16)
                head, _, body = asked.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                while len(body) < length:
                    body += connection.recv(2**16)
                seen.append(head + b"\r\n\r\n" + body)
                answer(connection)

        def listen() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", seen
        server.shutdown(socket.SHUT_RDWR)


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def ask(url: str, *, timeout: float = 300, key: str = KEY) -> str:
    told: list[str] = []
    endpoint = Endpoint("m", url, key, timeout=timeout, max_retries=0)
    endpoint.generate([Generation((Turn("user", "a secret prompt"),), 9)], lambda _, text: told.append(text))
    return told[0]


def refused(url: str, **options: float) -> str:
    with pytest.raises(RequirementError) as caught:
        ask(url, **options)
    return f"{caught.value.message}\n{caught.value.hint}"


def test_a_plain_answer_is_read() -> None:
    with serving(lambda connection: connection.sendall(reply(WELL))) as (url, seen):
        assert ask(url) == "well"
    assert b"accept-encoding: identity" in seen[0].lower()


@pytest.mark.slow
@pytest.mark.parametrize("status", ["301 A", "302 B", "303 C", "307 D", "308 E"])
@pytest.mark.parametrize("where", ["http://127.0.0.1:{port}/v1", "//localhost:{port}/x", "https://127.0.0.1:{port}/"])
def test_a_redirect_to_another_place_gets_neither_key_nor_prompt(status: str, where: str) -> None:
    with serving(lambda connection: connection.sendall(reply(WELL))) as (other, got):
        location = where.format(port=other.rpartition(":")[2].partition("/")[0])
        with serving(lambda connection: connection.sendall(reply(b"", status, f"Location: {location}"))) as (url, _):
            told = refused(url)
    assert "neither key nor prompt is sent" in told
    assert got == []


def test_a_redirect_to_the_same_place_is_followed() -> None:
    answers = iter([reply(b"", "307 Again", "Location: /v1/chat/completions/"), reply(WELL)])
    with serving(lambda connection: connection.sendall(next(answers))) as (url, seen):
        assert ask(url) == "well"
    assert b"a secret prompt" in seen[1]


def test_a_redirect_without_end_ends() -> None:
    with serving(lambda connection: connection.sendall(reply(b"", "307 On", "Location: /v1/x"))) as (url, seen):
        refused(url)
    assert len(seen) == 4


PACKED = {
    "gzip": gzip.compress(b" " * 10**6 + WELL),
    "deflate": zlib.compress(b" " * 10**6),
    "br": b"x",
    "zstd": b"x",
    "gzip, gzip": gzip.compress(gzip.compress(b" " * 10**6)),
}


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_reply_is_refused_and_not_unpacked(packing: str) -> None:
    answer = reply(PACKED[packing], "200 OK", f"Content-Encoding: {packing}")
    with serving(lambda connection: connection.sendall(answer)) as (url, _):
        assert f"its reply is packed ({packing})" in refused(url)


def flood_chunked(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def flood_unframed(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        connection.sendall(b" " * 0x10000)


def flood_of_an_error(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 No\r\nConnection: close\r\n\r\n")
    while True:
        connection.sendall(b" " * 0x10000)


@pytest.mark.parametrize("flood", [flood_chunked, flood_unframed, flood_of_an_error])
def test_a_reply_without_end_is_cut_off(flood: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "MOST_BYTES", 2**20)
    with serving(flood) as (url, _):
        assert "its reply is larger than 1,048,576 bytes" in refused(url)


def drip(before: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(before)
        while True:
            connection.sendall(drop)
            time.sleep(0.05)

    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
        drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        drip(b"HTTP/1.1 ", b"2"),
        drip(b"", b""),
    ],
    ids=["chunks", "body", "a header", "a status", "nothing"],
)
def test_a_reply_that_drips_is_given_up_after_its_time(answer: Callable) -> None:
    with serving(answer) as (url, _):
        assert "does not answer" in refused(url, timeout=0.4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"choices":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b"\xff\xfe",
        b"9" * 9000,
    ],
    ids=["lists", "objects", "choices", "no UTF-8", "a number"],
)
@pytest.mark.parametrize("status", ["200 OK", "400 No"])
def test_json_of_any_depth_is_one_clear_error(body: bytes, status: str) -> None:
    with serving(lambda connection: connection.sendall(reply(body, status))) as (url, _):
        assert url in refused(url)


FORMS = {
    "itself": KEY,
    "in capitals": KEY.upper(),
    "reversed": KEY[::-1],
    "for URLs": quote(KEY, safe=""),
    "in base64": base64.b64encode(KEY.encode()).decode(),
    "in hexadecimal": KEY.encode().hex(),
    "with spaces": " ".join(KEY),
    "its middle": KEY[6:18],
    "in JSON": json.dumps(KEY).replace("/", "\\/"),
    "its end": KEY[-9:],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", ["400 No", "401 No", "500 No"])
def test_a_key_that_the_server_echoes_is_not_shown(form: str, status: str) -> None:
    body = json.dumps({"error": {"message": f"bad key: {FORMS[form]} !"}}).encode()
    with serving(lambda connection: connection.sendall(reply(body, status))) as (url, _):
        told = refused(url)
    assert FORMS[form] not in told
    assert "its words hold the key" in told


def test_words_without_the_key_are_shown() -> None:
    assert without_key("the model gpt-4 does not exist", KEY) == "the model gpt-4 does not exist"
    assert without_key("abc", "abc") != "abc"


def test_no_traceback_of_a_command_holds_the_key() -> None:
    body = json.dumps({"error": {"message": f"bad key: {KEY}"}}).encode()
    answer = reply(body, "401 No")
    with serving(lambda connection: connection.sendall(answer)) as (url, _), pytest.raises(RequirementError) as caught:
        ask(url)
    assert KEY not in "".join(traceback.format_exception(caught.value))

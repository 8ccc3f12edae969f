"""A small OpenAI-compatible HTTP server that also answers as servers do on a bad day, on a script."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

FAULTS: dict[str, tuple[int, dict[str, str], str]] = {
    "401": (401, {}, '{"error": {"message": "Incorrect API key provided: sk-secret.", "code": "invalid_api_key"}}'),
    "404": (404, {}, '{"error": {"message": "The model does not exist.", "code": "model_not_found"}}'),
    "429": (429, {}, '{"error": {"message": "Rate limit reached."}}'),
    "429, wait 1.5 s": (429, {"Retry-After": "1.5"}, '{"error": {"message": "Rate limit reached."}}'),
    "500": (500, {}, "Internal Server Error"),
    "not JSON": (200, {}, "<html>Welcome to the hotel's network</html>"),
    "half of JSON": (200, {}, '{"choices": [{"mess'),
    "no choices": (200, {}, '{"error": {"message": "upstream failed"}}'),
    "choices by name": (200, {}, '{"choices": {"first": {"message": {"content": "a"}}}, "usage": {}}'),
    "deep JSON": (200, {}, '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects": (200, {}, '{"choices": ' + '{"a":' * 100_000 + "1" + "}" * 100_001),
    "a long number": (200, {}, '{"created": ' + "9" * 10_000 + "}"),
    "filtered": (400, {}, '{"error": {"message": "Blocked.", "code": "content_filter"}}'),
    "too long": (400, {}, '{"error": {"message": "This model takes 4096\\ntokens.", "param": "messages"}}'),
}
"""What goes wrong: status, headers and body."""


@dataclass(frozen=True)
class Asked:
    """A request, and what the server did with it: "well" or a fault."""

    body: dict
    outcome: str
    seconds: float
    key: str

    @property
    def text(self) -> str:
        """The last message."""
        return self.body["messages"][-1]["content"]


class JudgeServer:
    """Serves until the block ends; `script` says what becomes of the first requests, `then` of all others.

    An outcome is "well" (what `reply` makes of the request's body), a name of FAULTS, "hang" (no answer until the block
    ends), or "no NAME": the model takes no such parameter.
    """

    def __init__(
        self,
        reply: Callable[[dict], str] = lambda body: "Rating: [[7]]",
        script: Sequence[str] = (),
        then: str = "well",
    ) -> None:
        self.log: list[Asked] = []
        self.then = then
        self._reply = reply
        self._script = list(script)
        self._lock = Lock()
        self._ended = Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "JudgeServer":
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, outcome: str = "well") -> list[str]:
        """Return the last messages of the requests with an outcome, in the order of their arrival."""
        return [asked.text for asked in list(self.log) if asked.outcome == outcome]

    def wait(self, num: int, outcome: str) -> None:
        """Wait until so many requests had an outcome."""
        end = time.monotonic() + 300
        while len(self.asked(outcome)) < num:
            assert time.monotonic() < end, f"{len(self.asked(outcome))} of {num} {outcome}"
            time.sleep(0.01)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """List the models, as the interface has it, or refuse the key where the script's rest does."""
                if judge.then == "401":
                    self._send(*FAULTS["401"])
                else:
                    self._send(200, {}, '{"object": "list", "data": []}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge._lock:
                    outcome = judge._script.pop(0) if judge._script else judge.then
                    key = self.headers["Authorization"].removeprefix("Bearer ")
                    judge.log.append(Asked(body, outcome, time.monotonic(), key))
                if outcome == "hang":
                    judge._ended.wait()
                elif outcome == "well":
                    message = {"role": "assistant", "content": judge._reply(body)}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
                    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
                    self._send(200, {}, json.dumps(reply | {"choices": [choice], "usage": usage}))
                elif outcome.startswith("no ") and outcome != "no choices":
                    error = {"message": "Unsupported.", "param": outcome[3:], "code": "unsupported_parameter"}
                    self._send(400, {}, json.dumps({"error": error}))
                else:
                    self._send(*FAULTS[outcome])

            def _send(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if text.startswith("<") else "application/json")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no error of the server."""

"""Models behind an OpenAI-compatible chat endpoint: they answer, as a model that is scored or as a judge of others."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from fedcli.errors import RequirementError, UsageError, missing_package
from fedcli.eval.bounded_http import UnboundedError, bounded_client, without_key
from fedcli.eval.remembered import Usage
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood, before_stop
from fedcli.printable import without_credentials
from fedcli.tasks.conversation import Turn

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Sent to a server of one's own, which wants no key."""
MAX_STOPS = 4
"""As many stop sequences the interface takes."""
MAX_TOKENS = 10**9
"""A reply with as many tokens is none."""


@dataclass
class Endpoint:
    """The Engine of one model of an endpoint.

    The openai package asks again after 408, 409, 429, 5xx, a timeout or a lost connection: after 0.5, 1, 2, 4 and then
    every 8 seconds, or when Retry-After says. A reply that is not the interface's is asked for again likewise. A model
    that takes no `max_tokens` or no temperature (OpenAI's reasoning models) is asked without them.
    """

    name: str
    url: str = OPENAI_URL
    key: str = field(default=NO_KEY, repr=False)
    concurrency: int = 8
    timeout: float = 180.0
    """Seconds for one reply: a long one of a slow server takes minutes."""
    max_retries: int = 8
    usage: Usage = field(default_factory=Usage)
    _not_taken: set[str] = field(default_factory=set, init=False)

    def reach(self) -> "Endpoint":
        """Return the endpoint itself; raise RequirementError at once where nothing answers, or the key is refused."""
        with self._client(timeout=30.0, max_retries=1) as client:
            import openai

            try:
                client.models.with_raw_response.list()
            except (openai.APIConnectionError, openai.AuthenticationError) as error:
                raise self._explained(error) from self._shown_cause(error)
            except openai.APIStatusError:
                pass  # it answers; not every server lists its models
        return self

    def generate(self, requests: Sequence[Generation], on_answer: Callable[[int, str], None]) -> None:
        """Answer all requests, several at once; raise RequirementError where the endpoint does not.

        `on_answer` hears of each answer as it comes, of one at a time, also of those that come while another fails.
        """
        lock = Lock()
        with self._client(self.timeout, self.max_retries) as client:

            def answer(index: int) -> None:
                text, num_tokens = self._complete(client, requests[index])
                with lock:
                    self.usage.num_requests += 1
                    self.usage.num_generated_tokens += num_tokens
                    on_answer(index, text)

            _in_threads(answer, len(requests), self.concurrency)

    def log_likelihoods(self, requests: Sequence[Likelihood], on_answer: Callable[[int, LogLikelihood], None]) -> None:
        """Raise UsageError: a chat endpoint gives none."""
        raise UsageError(
            f"{self.name} is behind a chat endpoint, which gives no likelihoods",
            hint="Choose a benchmark that generates, or score a local model.",
        )

    def _client(self, timeout: float, max_retries: int) -> "openai.OpenAI":
        try:
            import openai
        except ImportError as error:
            raise missing_package("openai") from error
        client = bounded_client(timeout, connect=10.0)
        return openai.OpenAI(
            api_key=self.key, base_url=self.url, timeout=client.timeout, max_retries=max_retries, http_client=client
        )

    def _complete(self, client: "openai.OpenAI", request: Generation) -> tuple[str, int]:
        """Return the reply to a request, and how many tokens it has."""
        import openai

        for attempt in range(self.max_retries + 1):
            body = self._body(request)
            try:
                completion = client.chat.completions.create(**body)
            except openai.BadRequestError as error:
                if error.code == "content_filter":
                    return "", 0  # as where the filter stops the reply itself
                if error.param not in body or not str(error.code).startswith("unsupported"):
                    raise self._explained(error) from self._shown_cause(error)
                self._not_taken.add(str(error.param))
                continue
            except openai.APIError as error:
                raise self._explained(error) from self._shown_cause(error)
            except UnicodeEncodeError:  # of the request
                raise
            except (ValueError, RecursionError):
                completion = None  # no JSON, no UTF-8, a number of thousands of digits, nested too deeply
            if (text := _text(completion)) is not None:
                return before_stop(text, request.stop), _num_tokens(completion)
            if attempt < self.max_retries:
                time.sleep(min(0.5 * 2**attempt, 8.0))
        raise RequirementError(
            f"{without_credentials(self.url)} does not answer as an OpenAI-compatible chat endpoint does ({self.name})",
            hint="Check the URL (it often ends in /v1) and the server's log. What was answered is kept.",
        )

    def _body(self, request: Generation) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in self._not_taken else "max_tokens"
        turns = (Turn("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": turn.role, "content": turn.text} for turn in turns],
            "temperature": request.temperature,
            limit: request.max_new_tokens,
        }
        if request.top_p != 1:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop"] = list(request.stop[:MAX_STOPS])
        return {name: value for name, value in body.items() if name not in self._not_taken}

    def _shown_cause(self, error: "openai.APIError") -> "openai.APIError | None":
        """Return what a traceback may show: nothing that holds the key."""
        return error if self.key == NO_KEY or without_key(str(error), self.key) == str(error) else None

    def _explained(self, error: "openai.APIError") -> RequirementError:
        import openai

        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        cause = error.__cause__
        told = cause if isinstance(error, openai.APIConnectionError) and cause is not None else error.message
        detail = " ".join(str(told).split())
        if self.key != NO_KEY:
            detail = without_key(detail, self.key)
        if isinstance(error, openai.APITimeoutError):
            problem = "does not answer in time"
        elif cause is not None and isinstance(cause.__cause__, UnboundedError):
            problem = f"does not answer as one: {cause}"
        elif isinstance(error, openai.APIConnectionError):
            problem = f"cannot be reached: {detail[:300]}"
        elif status is not None and 300 <= status < 400:
            problem = f"sends its callers to another place ({status}), where neither key nor prompt is sent"
        else:
            problem = f"refuses to answer ({status}): {detail[:300]}" if status else f"fails: {detail[:300]}"
        cure = {
            401: f"Set {KEY_VARIABLE} to a key of this endpoint.",
            403: f"Use a key ({KEY_VARIABLE}) that may use this model.",
            404: "Check the model's name and the URL (it often ends in /v1).",
            **dict.fromkeys(range(300, 400), "If you trust that place, name it as the URL."),
            429: "Wait until the limit is over, or raise the quota.",
        }.get(status or 0, "Check the URL, the network and the server's log.")
        return RequirementError(
            f"the endpoint {without_credentials(self.url)} ({self.name}) {without_credentials(problem)}",
            hint=f"{cure} What was answered is kept: the same command goes on from there.",
        )


def find_endpoint(name: str, url: str | None = None) -> Endpoint:
    """Return the endpoint of a model at a URL (default: $OPENAI_BASE_URL, else OpenAI's), with $OPENAI_API_KEY.

    A server of one's own, which a URL names, may want no key. Raises RequirementError where OpenAI's key is missing,
    UsageError for what is no URL.
    """
    url = url or os.environ.get(URL_VARIABLE) or None
    key = os.environ.get(KEY_VARIABLE)
    if url is None and not key:
        raise RequirementError(
            f"{name} needs a key: the environment variable {KEY_VARIABLE} is not set",
            hint=f"Set {KEY_VARIABLE}, or name a server of your own by its URL.",
        )
    if url is not None and not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{without_credentials(url)} is no URL of an endpoint", hint="Name one such as http://localhost:8000/v1."
        )
    return Endpoint(name, url or OPENAI_URL, key or NO_KEY)


def _text(completion: Any) -> str | None:
    """Return the text of a reply, "" where a filter took it; None for what is no reply: the package checks none."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        return None
    if isinstance(content, str):
        return content.encode(errors="replace").decode()  # half of a surrogate pair can be neither kept nor sent
    return "" if content is None else None


def _num_tokens(completion: Any) -> int:
    """Return how many tokens a reply says it has; 0 where it says nothing, or nothing possible."""
    count = getattr(completion.usage, "completion_tokens", None)
    return count if type(count) is int and 0 <= count < MAX_TOKENS else 0


def _in_threads(call: Callable[[int], None], num_calls: int, num_threads: int) -> None:
    """Call a function for all numbers, some at once; after an error none is begun, and what has begun is awaited.

    The threads are daemons: Ctrl-C ends the command at once, however long a server hangs.
    """
    waiting = deque(range(num_calls))
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            try:
                call(number)
            except BaseException as error:  # raised again below, where a caller can meet it
                errors.append(error)

    threads = [Thread(target=work, daemon=True) for _ in range(min(num_threads, len(waiting)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        waiting.clear()
    if errors:
        raise errors[0]

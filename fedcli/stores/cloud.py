"""S3, Google Cloud Storage and Azure Blob Storage, and what speaks like them, through obstore."""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from fedcli.errors import ConfigError, WorkspaceError, require_packages
from fedcli.printable import on_one_line, without_credentials
from fedcli.stores.aws_profile import profile_options
from fedcli.stores.calls import AT_ONCE, at_once, interruptible
from fedcli.stores.objects import TRY_AGAIN, Entry, Objects, TooLargeError, UnlistableError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_WRITER = "fedcliwriter"
"""The metadata of a created object that tells who created it: an answer that was lost may hide that it was we."""
_CONFLICTS = 8
"""How often a creation is tried again that another one, which then failed, got in the way of (409 on S3)."""
_BREAKS = 8
"""How often is asked for what breaks off."""
_BROKEN_OFF = re.compile(
    "body error|error decoding response body|list response body|unexpected end|Content-Range header"
)
_TRIED = re.compile(r"after \d+ retries")
_LOST = "HTTP error"
"""What obstore says of a connection that broke; of an answer with an error it tells the status."""
_STATUS = re.compile(r"status code: (\d+ [A-Za-z ]+)")
_CAUSE = re.compile(r"<Code>([A-Za-z]+)</Code>|\"(?:code|reason)\": ?\"([A-Za-z_]+)\"")
_UNANSWERED = re.compile(r"(https?://[^/ ]+)\S* in .*?after (\d+) retries")
T = TypeVar("T")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""Of 429, 5xx and connections that break; 412, a condition that does not hold, is an answer."""
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 60
_REQUEST_SECONDS = 300
PART = 5 * 2**20
"""Bytes; large objects are written and read in such parts."""
_PARTS_AT_ONCE = 2
"""Two parts in _REQUEST_SECONDS need a line of 35 kB a second."""


class CloudObjects(Objects):
    """Objects of a bucket or a container, below a prefix."""

    def __init__(self, address: str, store: "ObjectStore", bulk: "ObjectStore | None" = None) -> None:
        """`bulk` is the same place for what is written, which may take longer than an answer."""
        super().__init__(address)
        self._store = store
        self._bulk = bulk or store

    def get(self, key: str, limit: int) -> bytes:
        first, num_bytes = self._part(key, 0, min(limit + 1, 2 * PART))
        if num_bytes > limit:
            raise TooLargeError(num_bytes)
        if num_bytes <= len(first):
            return first
        contents = bytearray(num_bytes)
        contents[: len(first)] = first

        def fetch(start: int) -> None:
            end = min(start + PART, num_bytes)
            contents[start:end] = self._part(key, start, end)[0]

        at_once([partial(fetch, start) for start in range(len(first), num_bytes, PART)], _PARTS_AT_ONCE)
        return bytes(contents)

    def get_part(self, key: str, start: int, end: int) -> bytes:
        return self._part(key, start, end)[0] if end > start else b""

    def _part(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        """Return some bytes of an object, none behind its end, and how many it has."""
        import obstore
        from obstore.exceptions import BaseError

        def read() -> tuple[bytes, int]:
            try:
                found = obstore.get(self._store, key, options={"range": (start, end)})
                return bytes(found.bytes()), found.meta["size"]
            except BaseError:
                if start < (num_bytes := obstore.head(self._store, key)["size"]):
                    raise
                return b"", num_bytes  # of what ends before, stores answer that there is no such range

        return self._asked("read", key, read)

    def head(self, key: str) -> Entry | None:
        import obstore

        try:
            found = self._asked("look at", key, lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return Entry(found["size"], found["e_tag"] or str(found["last_modified"]), found["last_modified"].timestamp())

    def heads(self, keys: Sequence[str]) -> list[Entry | None]:
        return at_once([partial(self.head, key) for key in keys], AT_ONCE)

    def put(self, key: str, contents: bytes) -> None:
        import obstore

        put = partial(obstore.put, self._bulk, key, contents, chunk_size=PART, max_concurrency=_PARTS_AT_ONCE)
        self._asked("write", key, put)

    def create(self, key: str, contents: bytes) -> bool:
        import obstore

        writer = uuid.uuid4().hex

        def create() -> None:
            obstore.put(self._bulk, key, contents, mode="create", attributes={_WRITER: writer}, use_multipart=False)

        for attempt in range(_CONFLICTS):
            try:
                with self._explained("create", key):
                    interruptible(create)
                return True
            except (FileExistsError, UnansweredError):  # obstore asks for no condition twice
                standing = self._writer(key)
                if standing is not None:
                    return standing == writer
            time.sleep(min(0.1 * 2**attempt, 5.0))  # S3 answers 409 while another creation of the name is under way
        raise self.unreachable("create", key, f"in {_CONFLICTS} tries it was neither made nor there")

    def _writer(self, key: str) -> str | None:
        """Return who created an object, "" where it does not tell; None where there is none."""
        import obstore

        try:
            found = self._asked("read", key, lambda: obstore.get(self._store, key, options={"head": True}))
        except FileNotFoundError:
            return None
        return str(found.attributes.get(_WRITER, ""))

    def below(self, folder: str) -> dict[str, int]:
        import obstore

        start = f"{folder}/" if folder else ""

        def listed() -> dict[str, int]:
            pages = obstore.list(self._store, prefix=folder or None)
            found = {entry["path"]: entry["size"] for page in pages for entry in page}
            return {key.removeprefix(start): size for key, size in found.items() if key.startswith(start)}

        return self._asked("list", folder, listed)

    def names(self, folder: str) -> list[str]:
        import obstore

        found = self._asked("list", folder, lambda: obstore.list_with_delimiter(self._store, prefix=folder or None))
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted({key.rpartition("/")[2] for key in keys if key != folder})

    def delete(self, key: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            self._asked("delete", key, lambda: obstore.delete(self._store, key))

    def _asked(self, action: str, key: str, ask: Callable[[], T]) -> T:
        """Return what is answered; ask again for what may be asked twice where obstore does not."""
        for attempt in range(1, _BREAKS + 1):
            try:
                with self._explained(action, key):
                    return interruptible(ask)
            except BrokenOffError:
                if attempt == _BREAKS:
                    raise
                time.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError  # the last one returns or raises

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Raise what is wrong in fedcli's words; FileNotFoundError and FileExistsError are answers."""
        from obstore.exceptions import (
            AlreadyExistsError,
            BaseError,
            InvalidPathError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                problem = f"{self.address}: there is no such bucket or container"
                raise ConfigError(problem, hint="Check the URL; fedcli makes none.") from None
            raise
        except (AlreadyExistsError, PreconditionError) as error:
            raise FileExistsError(key) from error
        except (PermissionDeniedError, UnauthenticatedError):
            raise self.denied(action, key) from None
        except InvalidPathError as error:
            problem = f"cannot {action} {self.address}/{key}: {_reason(error)}"
            raise UnlistableError(problem, hint="Remove the object of that name with the store's own tools.") from None
        except (BaseError, OSError) as error:  # obstore's texts hold whole answers, and what was asked
            reason = _reason(error)
            if _BROKEN_OFF.search(str(error)) or (_LOST in str(error) and not _TRIED.search(str(error))):
                problem = f"cannot {action} {self.address}/{key}: the connection breaks off"
                raise BrokenOffError(problem, hint=TRY_AGAIN) from None
            if reason.startswith(("401", "403")):
                raise self.denied(action, key) from None
            unreachable = self.unreachable(action, key, reason)
            if _LOST in str(error):
                raise UnansweredError(unreachable.message, hint=unreachable.hint) from None
            raise unreachable from None


class UnansweredError(WorkspaceError):
    """A connection broke: whether what was asked for is done nobody has said."""


class BrokenOffError(UnansweredError):
    """A connection broke, and obstore has not tried again: an answer had begun, or it takes no such request twice."""


def _reason(error: Exception) -> str:
    """Return what an error of obstore says, in a line without credentials."""
    text = str(error)
    status, cause = _STATUS.search(text), _CAUSE.search(text)
    if status is not None:
        return status[1].strip() + (f" ({cause[1] or cause[2]})" if cause else "")
    first = re.sub(r"^.*?Error performing [A-Z]+ ", "", text.partition("\n")[0])
    if (unanswered := _UNANSWERED.match(first)) is not None:
        return f"no answer from {without_credentials(unanswered[1])}, tried {int(unanswered[2]) + 1} times"
    return on_one_line(without_credentials(first))[:200]


def open_cloud(scheme: str, bucket: str, prefix: str) -> CloudObjects:
    """Return the objects below s3://, gs:// or az://; raise RequirementError without obstore. Nothing is asked yet."""
    require_packages(["obstore"])
    from obstore import store
    from obstore.exceptions import BaseError

    address = f"{scheme}://{bucket}/{prefix}".rstrip("/")
    own = profile_options() if scheme == "s3" else {}
    kinds = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
    make = partial(kinds[scheme], bucket, prefix=prefix or None, retry_config=RETRIES, **own)
    client = _client_options(scheme, own.get("endpoint", ""))
    answers = client | {"read_timeout": timedelta(seconds=_ANSWER_SECONDS)}
    try:
        return CloudObjects(address, make(client_options=answers), make(client_options=client))
    except (BaseError, ValueError, TypeError) as error:  # a URL or a setting that it refuses
        reason = on_one_line(without_credentials(str(error).partition("\n")[0]))[:200]
        hint = "Check the URL, and the credentials in the environment (docs/STORES.md)."
        raise ConfigError(f"{address} cannot be opened: {reason}", hint=hint) from None


def _client_options(scheme: str, endpoint_of_profile: str) -> dict[str, Any]:
    """Return time limits, and whether the endpoint, which the environment names first, may be asked without TLS."""
    named = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}[scheme]
    endpoint = urlsplit(os.environ.get(named) or endpoint_of_profile)
    is_allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    if endpoint.scheme == "http" and endpoint.hostname not in _LOOPBACK and not is_allowed:
        raise ConfigError(
            f"the endpoint {endpoint.hostname} has no TLS: whoever is on the way reads and changes what you send",
            hint="Name an https:// endpoint; or set AWS_ALLOW_HTTP=true for a network that you trust.",
        )
    return {
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        **({"allow_http": True} if endpoint.scheme == "http" or (scheme == "az" and _emulates_azure()) else {}),
    }


def _emulates_azure() -> bool:
    return os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")

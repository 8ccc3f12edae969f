"""S3, Google Cloud Storage and Azure Blob Storage, and what speaks like them, through obstore."""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser, Error
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from fedcli.errors import ConfigError, RequirementError, WorkspaceError, require_packages
from fedcli.printable import on_one_line, without_credentials
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

_CREDENTIALS = ("aws_access_key_id", "credential_", "role_arn", "sso_", "web_identity_token_file")
"""What settings of a profile begin with that say where its credentials come from."""
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
        import obstore

        def read() -> bytes:
            found = obstore.get(self._store, key)
            if (num_bytes := found.meta["size"]) > limit:
                raise TooLargeError(num_bytes)
            if num_bytes > 2 * PART:
                raise _Large(num_bytes)
            return bytes(found.bytes())

        try:
            return self._asked("read", key, read)
        except _Large as large:
            return self._get_in_parts(key, large.num_bytes)

    def _get_in_parts(self, key: str, num_bytes: int) -> bytes:
        """Return a large object, of which a part that breaks off is asked for again alone."""
        import obstore

        contents = bytearray(num_bytes)

        def fetch(start: int) -> None:
            end = min(start + PART, num_bytes)
            part = self._asked("read", key, lambda: obstore.get_range(self._store, key, start=start, end=end))
            contents[start:end] = memoryview(part)

        at_once([partial(fetch, start) for start in range(0, num_bytes, PART)], _PARTS_AT_ONCE)
        return bytes(contents)

    def get_part(self, key: str, start: int, end: int) -> bytes:
        import obstore

        def read() -> bytes:
            size = obstore.head(self._store, key)["size"]
            if start >= min(end, size):
                return b""
            return bytes(obstore.get_range(self._store, key, start=start, end=min(end, size)))

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


class _Large(Exception):
    """An object is read in parts."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


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

    address = f"{scheme}://{bucket}/{prefix}".rstrip("/")
    options: dict[str, Any] = {"retry_config": RETRIES, "prefix": prefix or None}
    options |= _aws_profile() if scheme == "s3" else {}
    make = partial({"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[scheme], bucket, **options)
    client = _client_options(scheme)
    answers = client | {"read_timeout": timedelta(seconds=_ANSWER_SECONDS)}
    try:
        return CloudObjects(address, make(client_options=answers), make(client_options=client))
    except store_errors() as error:
        reason = on_one_line(without_credentials(str(error).partition("\n")[0]))[:200]
        hint = "Check the URL, and the credentials in the environment (docs/STORES.md)."
        raise ConfigError(f"{address} cannot be opened: {reason}", hint=hint) from None


def store_errors() -> tuple[type[Exception], ...]:
    """Return the errors by which obstore refuses a URL or a setting."""
    from obstore.exceptions import BaseError

    return (BaseError, ValueError, TypeError)


def _client_options(scheme: str) -> dict[str, Any]:
    """Return time limits, and whether the endpoint that the environment names may be asked without TLS."""
    named = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}[scheme]
    endpoint = urlsplit(os.environ.get(named) or (_aws_settings().get("endpoint_url", "") if scheme == "s3" else ""))
    is_allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    if endpoint.scheme == "http" and endpoint.hostname not in _LOOPBACK and not is_allowed:
        raise ConfigError(
            f"${named} names {endpoint.hostname} without TLS: whoever is on the way reads and changes what you send",
            hint="Name an https:// endpoint; or set AWS_ALLOW_HTTP=true for a network that you trust.",
        )
    return {
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        **({"allow_http": True} if endpoint.scheme == "http" or (scheme == "az" and _emulates_azure()) else {}),
    }


def _emulates_azure() -> bool:
    return os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")


def _aws_profile() -> dict[str, Any]:
    """Return S3's settings from the files that `aws configure` writes, where the environment does not have them."""
    settings = _aws_settings()
    told: dict[str, Any] = {}
    if not ({"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys()):
        told["region"] = settings.get("region", "us-east-1")
    if "AWS_ENDPOINT_URL" not in os.environ and "endpoint_url" in settings:
        told["endpoint"] = settings["endpoint_url"]
    if "AWS_ACCESS_KEY_ID" in os.environ or not any(key.startswith(_CREDENTIALS) for key in settings):
        return told
    if {"aws_access_key_id", "aws_secret_access_key"} <= settings.keys():
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        told |= {name: settings[key] for name, key in names.items()}
        return told | ({"session_token": token} if (token := settings.get("aws_session_token")) else {})
    return told | {"credential_provider": _boto3_credentials()}


def _boto3_credentials() -> Any:
    """Return what gets the credentials of a profile that has no keys: roles, SSO, processes."""
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError as error:
        raise RequirementError(
            f"the AWS profile {_profile_name()} has no keys of its own, and boto3, which gets its, is not installed",
            hint="Install it with `pip install boto3`; or export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ) from error
    return Boto3CredentialProvider(Session())


def _profile_name() -> str:
    return os.environ.get("AWS_PROFILE") or "default"


def _aws_settings() -> Mapping[str, str]:
    """Return what ~/.aws/config and ~/.aws/credentials say of the profile."""
    found: dict[str, str] = {}
    name = _profile_name()
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        path = Path(os.environ.get(variable) or Path("~/.aws", file)).expanduser()
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (Error, UnicodeDecodeError) as error:
            hint = "Mend it, or name another one."
            raise ConfigError(f"{path} cannot be read: {type(error).__name__}", hint=hint) from None
        found |= parser[section] if parser.has_section(section) else {}
    if "AWS_PROFILE" in os.environ and not found:
        hint = "Name one of ~/.aws/config or ~/.aws/credentials in $AWS_PROFILE."
        raise ConfigError(f"there is no AWS profile {name}", hint=hint)
    return found

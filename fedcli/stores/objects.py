"""What an object store must do for a workspace: get, put, create, head, list and delete, by key."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedcli.errors import DeniedError, WorkspaceError

TRY_AGAIN = "Check the network and the store, then run the command again: it goes on where it was."


@dataclass(frozen=True)
class Entry:
    """What a store tells of an object without its contents."""

    num_bytes: int
    version: str
    """Another one whenever the object is written: an ETag where the store has them."""
    modified: float
    """Seconds since 1970, by the store's clock."""


class TooLargeError(Exception):
    """An object has more bytes than were asked for at most."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"{num_bytes} bytes")
        self.num_bytes = num_bytes


class UnlistableError(WorkspaceError):
    """A folder cannot be listed, as there is a key below it that is no path: whoever may write there can put one."""


class Objects(ABC):
    """Objects by key, POSIX paths below the address; keys are relative, and never the empty string.

    What may be tried again is, with growing pauses. All methods raise WorkspaceError where the store cannot be reached,
    and DeniedError where it forbids what is asked. Lists raise UnlistableError where a key below is no path.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        """The URL, without credentials."""

    @abstractmethod
    def get(self, key: str, limit: int) -> bytes:
        """Return an object; raise FileNotFoundError, or TooLargeError for one of more than `limit` bytes."""

    @abstractmethod
    def get_part(self, key: str, start: int, end: int) -> bytes:
        """Return some bytes of an object, fewer where it ends before; raise FileNotFoundError."""

    @abstractmethod
    def head(self, key: str) -> Entry | None:
        """Return what is known of an object; None where there is none."""

    @abstractmethod
    def put(self, key: str, contents: bytes) -> None:
        """Write an object at once, in place of the one that is there."""

    @abstractmethod
    def create(self, key: str, contents: bytes) -> bool:
        """Write an object at once; return False, and change nothing, where there is one: of two that race one wins."""

    @abstractmethod
    def below(self, folder: str) -> dict[str, int]:
        """Return all objects below a folder, "" for all, by their keys relative to it, with their sizes."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the first parts of the keys below a folder, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; what is not there is no error."""

    def another(self) -> "Objects":
        """Return the same place for another writer at the same time; itself where calls do not wait for each other."""
        return self

    def heads(self, keys: Sequence[str]) -> list[Entry | None]:
        """Return what is known of several objects, in their order."""
        return [self.head(key) for key in keys]

    def sweep_temporary(self, folder: str, older_than: float) -> None:
        """Remove what killed writes left below a folder that many seconds ago, where a store has such."""
        return None

    def denied(self, action: str, key: str) -> DeniedError:
        """Return the error for what the store forbids."""
        return DeniedError(
            f"{self.address} does not let you {action} {key or 'it'}",
            hint="Check which credentials this machine uses, and what they may do (docs/STORES.md has the policies).",
        )

    def unreachable(self, action: str, key: str, reason: str) -> WorkspaceError:
        """Return the error for a store that does not answer, or with an error that stays."""
        return WorkspaceError(f"cannot {action} {self.address}/{key}: {reason}", hint=TRY_AGAIN)

"""A folder of an object store, opened once: its record decides which files are its own."""

from contextlib import suppress

from fedcli.stores.objects import Objects, TooLargeError
from fedcli.workspace.object_keys import attempt_key, attempt_name, without_attempt
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.store import Folder, Store


class ObjectFolder(Folder):
    """A published folder as its record stood when it was opened."""

    def __init__(self, store: Store, objects: Objects, name: str, record: str | None, contents: bytes | None) -> None:
        super().__init__(store, name)
        self._objects = objects
        self._record = record
        self._contents = contents

    def names(self) -> list[str]:
        found = set()
        own = None if self._contents is None else attempt_name(self._contents)
        for path in self._objects.below(self._name):
            logical, attempt = without_attempt(path)
            if attempt in (None, own):
                found.add(logical.partition("/")[0])
        return sorted(found)

    def read(self, name: str, limit: int) -> bytes:
        full = f"{self._name}/{name}"
        try:
            if full == self._record and self._contents is not None:
                if len(self._contents) > limit:
                    raise TooLargeError(len(self._contents))
                return self._contents
            for key in self._keys(full):
                with suppress(FileNotFoundError):
                    return self._objects.get(key, limit)
        except TooLargeError as error:
            raise Refusal("size", f"{name} has {error.num_bytes} bytes, at most {limit} are allowed") from error
        raise FileNotFoundError(full)

    def read_part(self, name: str, start: int, end: int) -> bytes:
        full = f"{self._name}/{name}"
        for key in self._keys(full):
            with suppress(FileNotFoundError):
                return self._objects.get_part(key, start, end)
        raise FileNotFoundError(full)

    def _keys(self, full: str) -> list[str]:
        if self._record is None or self._contents is None:
            return [full]
        return [attempt_key(full, self._record, self._contents), full]
